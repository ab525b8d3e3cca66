"""Checkpoints: the slots of stacks are saved to a `state_dict` and loaded from it, bit for bit.

A saved state is plain: a dict of tensors for each parameter, and flat options for each group. It can be loaded under
``torch.load(weights_only=True)``, and by parameter name in another order. Options that are functions (a schedule for
the refresh frequency) are not saved; the optimizer that loads keeps its own.

Loading first checks everything, and copies when nothing can go wrong any more. So a state that is refused changes
nothing.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from steepest.engine.group import option_defaults, plain_options
from steepest.exchange.shards import fits, local, shard_like
from steepest.rule import Elementwise, State
from steepest.rules import RULES
from steepest.rules.aliases import resolve
from steepest.stack.names import parameter_names
from steepest.stack.stack import segments_of, state_alone, state_dtype
from steepest.stack.storage import Storage, laid_out
from steepest.view import View

FORMAT = 2
"""The number of the format of a saved state. Every parameter group has it under "format", because flattened distributed
checkpoints keep what is in groups, and nothing else. The number grows when an older steepest would misread the state.

2: KL-SOAP and KL-Shampoo are rules of their own, and not an option of "soap" and "shampoo".
1: the first with a number. A state without one is of format 0, which is the same.
"""

CLOCKS = ("step", "clock")


def detached(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state_dict with tensors of its own, which are no views into stacks, and without functions as options."""
    state = {key: copied(entries) for key, entries in state_dict["state"].items()}
    groups = [{k: copied(v) for k, v in group.items() if not callable(v)} for group in state_dict["param_groups"]]
    return state_dict | {"state": state, "param_groups": groups}


def copied(entries: Any, read: Callable[[Tensor], Tensor] = lambda saved: saved) -> Any:
    """Return a copy of a parameter's state, or of anything else that others have put there; ``read`` reads tensors."""
    if isinstance(entries, Tensor):
        x = read(entries)
        return (x.detach() if x.requires_grad else x).clone()
    if isinstance(entries, dict):
        return {name: copied(value, read) for name, value in entries.items()}
    return copy.deepcopy(entries)


def match(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, State]
) -> tuple[dict[Tensor, Any], dict[Any, Any], list[dict[str, Any]]]:
    """Match a saved state with an optimizer's groups and state; nothing is changed.

    Returns:
        The saved entries of each parameter that has state there; what others had put into the state elsewhere, also for
        parameters that are frozen; and the saved options of each group.

    Raises:
        ValueError: if the saved state doesn't fit.
    """
    _check_structure(state_dict)
    saved_groups = state_dict["param_groups"]
    if saved_groups and not any("rule" in group or "format" in group for group in saved_groups):
        raise ValueError(
            "the saved state is another optimizer's, whose groups name no rule: steepest.adopt(optimizer, state_dict) "
            "takes over what it has in common with this one"
        )
    options = [read_options(number, group) for number, group in enumerate(saved_groups)]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"the saved state has {len(saved_groups)} parameter groups, the optimizer has {len(groups)}: "
            "build it with as many; groups that are new are added after loading, with add_param_group"
        )
    mine, theirs = iter(parameter_names(groups)), iter(parameter_names(saved_groups))
    entries: dict[Tensor, Any] = {}
    others: dict[Any, Any] = {}
    keys_of_params: set[Any] = set()
    for number, (group, saved_group, new) in enumerate(zip(groups, saved_groups, options, strict=True)):
        names = list(islice(mine, len(group["params"])))
        keys = _match_parameters(number, group, saved_group, names, list(islice(theirs, len(saved_group["params"]))))
        keys_of_params.update(keys)
        _check_options(number, group, new)
        names = names if group.get("param_names") else [f"parameter {key}" for key in keys]
        for p, name, key in zip(group["params"], names, keys, strict=True):
            saved, here = state_dict["state"].get(key), state.get(p) or meta_state(p, group)
            empty = saved is None or (isinstance(saved, Mapping) and not saved)
            if isinstance(saved, Mapping) and not state.get(p) and saved.keys().isdisjoint(here):
                others |= {} if empty else {p: saved}
            elif not empty:
                _check_view(name, p, here, group, {**group, **new})
                _check_entries(name, saved, here)
                entries[p] = saved
            elif state.get(p):
                raise ValueError(
                    f"the saved state has nothing for {name}; load it into an optimizer of the same parameters"
                )
    others |= {k: v for k, v in state_dict["state"].items() if k not in keys_of_params}
    return entries, others, options


def read_options(number: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of a saved group, as copies, because whoever saved them may go on changing a tensor."""
    options = {k: v for k, v in group.items() if k not in ("params", "param_names", "format")}
    written = group.get("format", 0)
    if not isinstance(written, int) or isinstance(written, bool) or written < 0:
        raise ValueError(f"format={written!r} in parameter group {number} of the saved state: must be an integer >= 0")
    if written > FORMAT:
        raise ValueError(
            f"the saved state is of format {written}, written by a newer steepest; this one reads formats up to "
            f"{FORMAT}: upgrade steepest"
        )
    if written < 2:
        options = resolve({{"refresh": "solver"}.get(name, name): value for name, value in options.items()})
        if options.get("rule") in ("soap", "shampoo"):
            options.pop("kl_floor", None)
    return copy.deepcopy(options)


# What every state_dict must be.


def _check_structure(state_dict: Any) -> None:
    """Raise unless a state_dict has groups with parameters, and a dict of state."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        found = f"only {_some(state_dict)}" if isinstance(state_dict, Mapping) else f"it is a {_kind(state_dict)}"
        raise ValueError(f"the saved state has no 'state' and 'param_groups', {found}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"the saved 'state' is a {_kind(state)}, not a dict from parameters to tensors")
    if not isinstance(groups, list | tuple):
        raise ValueError(f"the saved 'param_groups' are a {_kind(groups)}, not a list")
    seen: set[Any] = set()
    for number, group in enumerate(groups):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, list | tuple) or not all(isinstance(key, int | str) for key in keys):
            raise ValueError(f"parameter group {number} of the saved state is not a dict with a list of 'params'")
        names = keys if group.get("param_names") is None else group["param_names"]
        if not isinstance(names, list | tuple) or not len(names) == len(keys) == len(set(keys)):
            raise ValueError(f"parameter group {number} of the saved state doesn't have one name for each parameter")
        if not all(isinstance(name, int | str) for name in names):
            raise ValueError(
                f"parameter group {number} of the saved state has names that are not strings: {_some(names)}"
            )
        if seen & set(keys):
            raise ValueError(f"parameter group {number} of the saved state repeats {_some(seen & set(keys))}")
        seen |= set(keys)


# What fits this optimizer.


def _match_parameters(
    number: int, here: Mapping[str, Any], there: Mapping[str, Any], mine: Sequence[str], theirs: Sequence[str]
) -> Sequence[Any]:
    """Return the saved key of each parameter of a group: by name where both sides have names, else by position."""
    keys: Sequence[Any] = there["params"]
    if here.get("param_names") and there.get("param_names") and list(mine) != list(theirs):
        twice = [name for names in (mine, theirs) for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"parameter group {number} has several parameters of the name {twice[0]!r}, here or in the saved "
                "state, so that they can't be told apart: give each a name of its own"
            )
        added = [name for name in mine if name not in theirs]
        if added:
            raise ValueError(
                f"parameter group {number} has {_some(added)}, which the saved state doesn't have: load before they "
                "are added with add_param_group"
            )
        removed = [name for name in theirs if name not in mine]
        if removed:
            raise ValueError(
                f"parameter group {number} has no {_some(removed)}, which the saved state has: take them out of its "
                "'params' and 'param_names' to load the rest"
            )
        by_name = dict(zip(theirs, keys, strict=True))
        return [by_name[name] for name in mine]
    if len(here["params"]) != len(keys):
        raise ValueError(
            f"parameter group {number} was saved with {len(keys)} parameters and has {len(here['params'])} here: load "
            "into a group of the same parameters; new ones are added after loading, with add_param_group"
        )
    return keys


def _check_options(number: int, group: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise unless the saved options are in range under the same rule."""
    rule = group["rule"]
    if new.get("rule", rule) != rule:
        raise ValueError(f"parameter group {number} was saved under {new['rule']!r}, and is under {rule!r}")
    for name, default in option_defaults(rule).items():
        value = new.get(name, default)
        plain = bool if isinstance(default, bool) else bool | int | float | None if default is None else object
        if name != "lr" and (not isinstance(value, plain) or isinstance(value, Tensor)):
            wanted = "a bool" if plain is bool else "a plain value"
            raise ValueError(f"{name}={value!r} in parameter group {number} of the saved state: must be {wanted}")
    try:
        plain_options({**group, **new})
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the options of parameter group {number} of the saved state are damaged: {error}") from error


def _check_entries(name: str, saved: Any, here: State) -> None:
    """Raise unless saved entries hold a parameter's state, each tensor in its shape; entries of others may be there."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{name}: the saved state is a {_kind(saved)}, not a dict of tensors")
    for key, x in here.items():
        if key not in saved:
            raise ValueError(
                f"{name}: the saved state has no {key!r}, only {_some(saved)}; was it saved by another rule?"
            )
        check_entry(name, key, saved[key], x, "was saved")


def check_entry(name: str, key: str, y: Any, x: Tensor, was: str) -> None:
    """Raise unless ``y`` can be copied into ``x``, the entry ``key`` of a parameter's state."""
    if not isinstance(y, Tensor) or y.shape != x.shape:
        form = f"with shape {list(y.shape)}" if isinstance(y, Tensor) else f"as a {_kind(y)}"
        raise ValueError(f"{name}: {key!r} {was} {form}, and has shape {list(x.shape)} here")
    number = y.is_floating_point() if x.is_floating_point() else y.dtype == x.dtype
    if not number or y.layout != torch.strided or y.is_meta:
        raise ValueError(f"{name}: {key!r} {was} as {_kind(y)}, which can't be copied into a {_kind(x)}")
    if not fits(x, y):
        raise ValueError(
            f"{name}: {key!r} {was} as the shard of another rank; load it with torch.distributed.checkpoint"
        )
    y = local(y)
    if key.split(".")[0] in CLOCKS and not bool(((y >= 0) & (y == y.floor()) & torch.isfinite(y)).all()):
        raise ValueError(f"{name}: {key!r} {was} as {y.tolist()!r}: must be a count of updates, an integer >= 0")


def _check_view(name: str, p: Tensor, here: State, group: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise unless options ``then`` see a parameter as the same matrices, with the same state, as ``group`` does."""
    try:
        same = formats(meta_state(p, then)) == formats(here)
        if same and not issubclass(RULES[group["rule"]], Elementwise):
            same = cuts(p, then) == cuts(p, group)
    except Exception as error:
        raise ValueError(f"{name}: the saved options are damaged: {error}") from error
    if not same:
        changed = [k for k in option_defaults(group["rule"]) if repr(then[k]) != repr(group[k])]
        options = ", ".join(f"{k}={then[k]!r} (here {group[k]!r})" for k in changed)
        raise ValueError(f"{name}: its state was laid out by other options: {options}; build the optimizer with those")


def meta_state(p: Tensor, group: Mapping[str, Any]) -> State:
    """Return the state that a parameter has under its group's options, on the meta device."""
    return fresh_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group)


def fresh_state(p: Tensor, group: Mapping[str, Any]) -> State:
    """Return the state that a parameter starts with under its group's options."""
    rule = RULES[group["rule"]].from_group(group)
    if isinstance(rule, Elementwise):
        like = partial(torch.empty_like, dtype=state_dtype(p), requires_grad=False)
        if Storage.of(rule) is None:
            return rule.init(like(p))
        stored = laid_out(rule, like(local(p), memory_format=torch.contiguous_format))
        return {name: shard_like(p, x) if x.dim() else x for name, x in stored.items()}
    if rule.captures and group.get("bias") and p.dim() < 2:  # the bias of a layer, whose weight has the state of both
        step = torch.zeros((), dtype=state_dtype(p), device=p.device)
        return {"step": step, "clock": torch.zeros((), dtype=torch.int64, device="cpu")}
    segments = segments_of(0, 0, p, group)
    return {name: x for segment in segments for name, x in state_alone(rule, segment, p, p.device).items()}


def formats(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the names, shapes and dtypes of a parameter's state."""
    return {name: (x.shape, x.dtype) for name, x in state.items()}


def cuts(p: Tensor, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells one view of a parameter from another."""
    view = View.of(p, group)
    return view.stored, view.transpose, view.heads, [(r.start, c.start) for r, c in view.blocks], view.pieces


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return " ".join([str(x.dtype).removeprefix("torch."), *(["without values"] if x.is_meta else []), "tensor"])
    return type(x).__name__


def _some(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
