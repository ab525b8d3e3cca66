"""What others have written to ``param_groups`` and ``state`` since the engine looked last.

torch.optim's users write to both: schedulers, wrappers that keep entries of their own there, code that resets momentum
or that grows, prunes and replaces layers. Whatever they write is used as torch.optim would use it, or refused by name
before anything has moved; it is never ignored. `Seen` tells at next to no cost whether anything was written, because it
compares objects by identity. The rest of this module is for the steps before which something was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from steepest.engine.checkpoint import CLOCKS, check_entry, cuts, formats, meta_state
from steepest.exchange.shards import is_dtensor
from steepest.rule import Rule, State, number
from steepest.rules import RULES
from steepest.view import OPTIONS as VIEW_OPTIONS

ABSENT = object()
"""Stands for an entry that is not there."""

Form = tuple[tuple[str, Any], ...]
"""The options of a group that lay out the state of its parameters, as pairs of name and value."""


class Seen:
    """A snapshot, by reference, of an optimizer's groups and state."""

    def __init__(self, groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]) -> None:
        self.groups = list(groups)
        self.options = [(list(group), list(group.values())) for group in groups]
        self.params = [p for group in groups for p in group["params"]]
        self.kinds = [(p.shape, p.dtype, p.device) for p in self.params]
        self.names = [None if (names := group.get("param_names")) is None else list(names) for group in groups]
        self.sizes = [len(group["params"]) for group in groups]
        self.keys = list(state)
        self.entries = _entries(state)
        self.last = _last_names(state)

    def changed_options(self, groups: Sequence[dict[str, Any]]) -> dict[int, set[str]]:
        """Return, for each group in which entries are new or other objects than before, their names."""
        if len(groups) != len(self.groups):
            return {n: set(group) for n, group in enumerate(groups)}
        changed: dict[int, set[str]] = {}
        for n, (group, then, (names, values)) in enumerate(zip(groups, self.groups, self.options, strict=True)):
            if len(group) != len(values) or not all(map(is_, group.values(), values)) or group is not then:
                old = dict(zip(names, values, strict=True)) if group is then else {}
                changed[n] = {k for k, x in group.items() if x is not old.get(k, ABSENT)} | (old.keys() - group.keys())
            rate = group.get("lr")  # a tensor may be filled in place; asking for its value waits for an accelerator
            if isinstance(rate, Tensor) and rate.is_cpu and not _is_rate(rate):
                changed.setdefault(n, set()).add("lr")
        return changed

    def note(self, groups: Sequence[dict[str, Any]], numbers: Iterable[int]) -> None:
        """Take the options of some groups into the snapshot."""
        for n in numbers:
            self.groups[n], self.options[n] = groups[n], (list(groups[n]), list(groups[n].values()))

    def same_parameters(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether the groups have the same parameters, with names, shapes, dtypes and devices as before."""
        params = [p for group in groups for p in group["params"]]
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and [(p.shape, p.dtype, p.device) for p in params] == self.kinds
            and [len(group["params"]) for group in groups] == self.sizes
            and [group.get("param_names") for group in groups] == self.names
        )

    def dims(self, groups: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the dimensions that each parameter had before.

        If none of them is left, and those that have taken their places are vectors only, as flat parts are under ZeRO,
        there were matrices before.
        """
        known = {p: len(shape) for p, (shape, _, _) in zip(self.params, self.kinds, strict=True)}
        params = [p for group in groups for p in group["params"]]
        flattened = not known.keys() & set(params) and all(p.dim() == 1 for p in params)
        before = max(known.values(), default=0) if flattened else 0
        return [known.get(p) or before for p in params]

    def same_state(self, state: Mapping[Any, Any]) -> bool:
        """Return whether the state has the same entries: under the same keys, the same objects."""
        if len(state) != len(self.keys) or not all(map(is_, state, self.keys)):
            return False
        entries = _entries(state)
        return (
            len(entries) == len(self.entries)
            and all(map(is_, entries, self.entries))
            and _last_names(state) == self.last
        )


def _is_rate(x: Tensor) -> bool:
    """Return whether a tensor on the host holds one learning rate; complex numbers can't be compared."""
    return x.numel() == 1 and not x.is_complex() and 0 <= float(x) < math.inf


def _entries(state: Mapping[Any, Any]) -> list[Any]:
    """Return all values in a state, in order."""
    try:
        return list(chain.from_iterable(map(dict.values, state.values())))
    except TypeError:  # others have put something there that is no dict
        return list(chain.from_iterable(v.values() if isinstance(v, dict) else (v,) for v in state.values()))


def _last_names(state: Mapping[Any, Any]) -> list[Any]:
    """Return the name of each parameter's last entry, where an entry that is renamed in a dict comes to stand."""
    return [next(reversed(v), None) if isinstance(v, dict) else None for v in state.values()]


# What the layout of state depends on.


@dataclass(frozen=True)
class Laid:
    """The state that the engine has laid out for one parameter, and what the layout depends on."""

    state: State
    form: Form
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, p: Tensor, form: Form, state: State) -> Laid:
        """Return the state of a parameter as it is laid out now."""
        return cls(state, form, p.shape, p.dtype, p.device)

    def holds(self, p: Tensor, form: Form) -> bool:
        """Return whether the state would be laid out in the same way now."""
        return (self.form, self.shape, self.dtype, self.device) == (form, p.shape, p.dtype, p.device)


def form_of(group: Mapping[str, Any]) -> Form:
    """Return the options of a group that lay out state."""
    rule = RULES[group["rule"]]
    names = ["rule", *rule.layout_options(), *((*VIEW_OPTIONS, "block_size") if issubclass(rule, Rule) else ())]
    return tuple((name, group[name]) for name in names)


def changed_form(laid: Mapping[Tensor, Laid], group: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether options of a group that lay out state have changed; ``names`` are those that may have."""
    form = form_of(group)
    return not dict(form).keys().isdisjoint(names) and any(laid[p].form != form for p in group["params"] if p in laid)


def check_rule(number: int, group: Mapping[str, Any], laid: Mapping[Tensor, Laid]) -> None:
    """Raise if the state of parameters was laid out under another rule than their group has now."""
    rule = group.get("rule")
    for p in group["params"]:
        then = dict(laid[p].form)["rule"] if p in laid else rule
        if isinstance(rule, str) and rule != then:
            raise ValueError(
                f"rule={rule!r} in parameter group {number}, which was under {then!r}: build another "
                "optimizer; steepest.adopt takes over what carries"
            )


# What becomes of the entries that are there.


def taken_over(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    state: Mapping[Any, Any],
    laid: Mapping[Tensor, Laid],
) -> dict[Tensor, dict[str, Tensor]]:
    """Return the values that the entries of each parameter's state shall have; absent ones are made anew.

    * An entry that the engine has made counts for the parameter under which it stands now.
    * An entry that others have put there is copied. It must fit.
    * If a parameter has another shape than before, entries that don't fit any more are made anew; and all of them are,
      unless others have put some there.
    * Entries under other names are none of the engine's.

    Raises:
        ValueError: for an entry that doesn't fit, or that is laid out by options that have changed.
    """
    made = {id(x): owner for owner in laid.values() for x in owner.state.values()}
    params = [(p, group) for group in groups for p in group["params"]]
    values = {}
    for (p, group), name in zip(params, names, strict=True):
        entries = state.get(p, {})
        if not isinstance(entries, dict):
            raise ValueError(f"{name}: its state is a {type(entries).__name__}: must be a dict of tensors")
        if (
            p in laid
            and laid[p].holds(p, form_of(group))
            and all(entries.get(k) is x for k, x in laid[p].state.items())
        ):
            values[p] = laid[p].state
        elif entries:
            values[p] = _fitting(p, group, name, entries, made)
    return values


def _fitting(
    p: Tensor, group: Mapping[str, Any], name: str, entries: Mapping[str, Any], made: Mapping[int, Laid]
) -> dict[str, Tensor]:
    """Return the entries that fit a parameter's state under its group's options; see `taken_over`."""
    layout = meta_state(p, group)
    owners = {key: made[id(x)] for key, x in entries.items() if id(x) in made}
    resized = any(owner.shape != p.shape for owner in owners.values())
    if resized and not (layout.keys() & entries.keys()) - owners.keys():
        return {}
    for owner in owners.values():
        if owner.shape == p.shape:
            _check_form(p, group, name, owner, layout)
    values = {}
    for key, x in layout.items():
        y = entries.get(key, ABSENT)
        if (key in owners or is_dtensor(y)) and y.shape == x.shape:
            values[key] = y
        elif y is not ABSENT and not (resized and key in owners):
            if number(y) and x.numel() == 1:
                y = torch.full(x.shape, float(y), dtype=torch.float64, device="cpu")
            counts = key.split(".")[0] in CLOCKS and isinstance(y, Tensor)  # which may be in any dtype
            check_entry(name, key, y, x.to(y.dtype) if counts else x, "was set")
            values[key] = y
    return values


def _check_form(p: Tensor, group: Mapping[str, Any], name: str, owner: Laid, layout: State) -> None:
    """Raise if options of the group lay state out otherwise than those by which it was laid out."""
    form, then = dict(form_of(group)), dict(owner.form)
    if form == then:
        return
    same = form["rule"] == then["rule"] and _shapes(layout) == _shapes(owner.state)
    if same and "heads" in form:
        same = cuts(p, group) == cuts(p, {**group, **then})
    if not same:
        changed = {k: v for k, v in form.items() if then.get(k, ABSENT) != v}
        options = ", ".join(f"{k}={v!r} (was {then.get(k)!r})" for k, v in changed.items())
        raise ValueError(
            f"{name}: its state was laid out by other options: {options}; set them back, or delete its entry of "
            "optimizer.state to start afresh"
        )


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: shape for name, (shape, _) in formats(state).items()}


def stale(state: Mapping[Any, Any], groups: Iterable[Mapping[str, Any]], laid: Mapping[Tensor, Laid]) -> list[Tensor]:
    """Return the parameters that are in no group any more, and whose state the engine has made.

    Raises:
        ValueError: for state that others have put there for a tensor that is in no group.
    """
    here = {p for group in groups for p in group["params"]}
    gone = [p for p in state if isinstance(p, Tensor) and p not in here]
    made = {id(x) for owner in laid.values() for x in owner.state.values()}
    for p in gone:
        if not isinstance(state[p], dict) or any(id(x) not in made for x in state[p].values()):
            raise ValueError(
                f"optimizer.state has an entry for a tensor of shape {list(p.shape)} that is in no parameter group: "
                "delete it, or add the tensor with add_param_group"
            )
    return gone


def remove(
    state: MutableMapping[Any, Any], gone: Iterable[Tensor], old: Mapping[Tensor, Laid], new: Mapping[Tensor, Laid]
) -> None:
    """Remove what the engine had made and uses no more, after all state was laid out anew."""
    made = {id(x) for owner in old.values() for x in owner.state.values()}
    for p in gone:
        del state[p]
    for p, entries in state.items():
        for name in [name for name, x in entries.items() if id(x) in made] if isinstance(entries, dict) else ():
            if p not in new or name not in new[p].state:
                del entries[name]


def renamed(groups: Sequence[Mapping[str, Any]], seen: Seen) -> dict[int, list[str]]:
    """Return the names of groups whose parameters were moved without their names: a name belongs to its parameter.

    A new parameter takes the name of the one in whose place it stands.
    """
    if not seen.names or None in seen.names:
        return {}
    known = dict(zip(seen.params, chain.from_iterable(names or () for names in seen.names), strict=True))
    of_group = {id(group): names for group, names in zip(seen.groups, seen.names, strict=True)}
    in_place_of = dict(enumerate(seen.names))
    found = {}
    for n, group in enumerate(groups):
        names, params = list(group.get("param_names") or ()), group["params"]
        if names == of_group.get(id(group), in_place_of.get(n)):
            in_place = names if len(names) == len(params) else [None] * len(params)
            names = [known.get(p, name) for p, name in zip(params, in_place, strict=True)]
        if len(names) != len(params) or None in names:
            raise ValueError(
                f"parameter group {n} has {len(params)} parameters, and names for others: give its 'param_names' a "
                "name for each"
            )
        found[n] = names
    twice = [name for name, count in Counter(chain.from_iterable(found.values())).items() if count > 1]
    if twice:
        raise ValueError(f"several parameters have the name {twice[0]!r}: give each one of its own in 'param_names'")
    return found
