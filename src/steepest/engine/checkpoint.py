"""Saving and loading: slots of stacks to a `state_dict` and back, bit for bit.

A saved state is plain: per parameter a dict of tensors, per group flat options. It can be loaded under
``torch.load(weights_only=True)``, and by parameter name in another order. Options that are functions (a schedule for
the refresh frequency) are not saved; the loading optimizer keeps its own.

Loading reads everything first, and copies when nothing can go wrong any more: a state that is refused changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.engine.group import check_options, option_defaults
from steepest.exchange.placement import fits, local, put
from steepest.rule import Elementwise, State
from steepest.rules import RULES
from steepest.stack.names import bare
from steepest.stack.stack import Stack, loose, state_dtype
from steepest.view import View

if TYPE_CHECKING:
    from steepest.engine.optimizer import Optimizer

FORMAT = 1
"""The layout of a saved state, as every parameter group carries it under "format": flattened distributed checkpoints
keep what stands in groups, and nothing beside them. A state without a number is of format 0, which had the same
layout. The number grows when an older steepest would misread the state."""

CLOCKS = ("step", "clock")


def detached(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with tensors of its own, no views into stacks, and no functions among the options."""
    state = {key: {name: x.clone() for name, x in named.items()} for key, named in state_dict["state"].items()}
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state_dict["param_groups"]]
    return state_dict | {"state": state, "param_groups": groups}


@torch.no_grad()
def load(
    optimizer: Optimizer, state_dict: dict[str, Any], read: Callable[[Tensor], Tensor] = lambda saved: saved
) -> None:
    """Check a state_dict against the optimizer as a whole, then copy it in; see `Optimizer.load_state_dict`.

    Args:
        optimizer: what takes the state.
        state_dict: the saved state.
        read: from a tensor in it to the one with the values, if those come from elsewhere.
    """
    state_dict = copy.copy(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    saved, options = check(optimizer, state_dict)
    optimizer._welcome(
        (number, i)
        for number, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p in saved
    )
    for p, tensors in saved.items():
        for name, x in optimizer.state[p].items():
            put(x, read(tensors[name]))
    for group, new in zip(optimizer.param_groups, options, strict=True):
        group.update(new)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def check(
    optimizer: Optimizer, state_dict: Mapping[str, Any]
) -> tuple[dict[Tensor, Mapping[str, Tensor]], list[dict[str, Any]]]:
    """Raise ValueError unless a state_dict fits the optimizer; else each parameter's tensors in it, and the options."""
    _expect_parts(state_dict)
    groups = state_dict["param_groups"]
    saved: dict[Tensor, Mapping[str, Tensor]] = {}
    options = [_options(number, group) for number, group in enumerate(groups)]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the saved state has {len(groups)} parameter groups, the optimizer has {len(optimizer.param_groups)}: "
            "build it with as many; groups that are new are added after loading, with add_param_group"
        )
    for number, (group, there, new) in enumerate(zip(optimizer.param_groups, groups, options, strict=True)):
        keys = _match(number, group, there)
        _check_options(number, group, new)
        for p, name, key in zip(group["params"], group.get("param_names") or map(_numbered, keys), keys, strict=True):
            tensors = state_dict["state"].get(key)
            if tensors is not None and not (isinstance(tensors, Mapping) and not tensors):
                here = optimizer.state.get(p) or _blank(p, group)
                _check_layout(name, p, here, group, group | new)
                _check(name, tensors, here)
                saved[p] = tensors
            elif optimizer.state.get(p):
                raise ValueError(f"the saved state has nothing for {name}; load it into the optimizer that it is of")
    return saved, options


def _numbered(key: Any) -> str:
    return f"parameter {key}"


# What a state_dict must be, whoever loads it.


def _expect_parts(state_dict: Any) -> None:
    """Raise unless there are groups with parameters, and dicts of tensors."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        what = f"only {_some(state_dict)}" if isinstance(state_dict, Mapping) else f"it is a {_kind(state_dict)}"
        raise ValueError(f"what was saved has no 'state' and 'param_groups', {what}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"the saved 'state' is a {_kind(state)}, not a dict from parameters to tensors")
    if not isinstance(groups, list | tuple):
        raise ValueError(f"the saved 'param_groups' are a {_kind(groups)}, not a list")
    seen: set[Any] = set()
    for number, group in enumerate(groups):
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, list | tuple) or not all(isinstance(key, int | str) for key in keys):
            raise ValueError(f"parameter group {number} of the saved state is no dict with a list of 'params'")
        names = keys if group.get("param_names") is None else group["param_names"]
        if not isinstance(names, list | tuple) or not len(names) == len(keys) == len(set(keys)):
            raise ValueError(f"parameter group {number} of the saved state doesn't have one name for each parameter")
        if not all(isinstance(name, int | str) for name in names):
            raise ValueError(f"parameter group {number} of the saved state has names that are no text: {_some(names)}")
        if seen & set(keys):
            raise ValueError(f"parameter group {number} of the saved state has {_some(seen & set(keys))} once more")
        seen |= set(keys)


def _options(number: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group's options, as values of their own: the saver may go on changing a tensor learning rate."""
    options = {k: v for k, v in group.items() if k not in ("params", "param_names", "format")}
    written = group.get("format", 0)
    if not isinstance(written, int) or isinstance(written, bool) or written < 0:
        raise ValueError(f"format={written!r} in parameter group {number} of the saved state: must be an integer >= 0")
    if written > FORMAT:
        raise ValueError(
            f"the saved state is of format {written}, written by a newer steepest; this one reads formats up to "
            f"{FORMAT}: upgrade steepest"
        )
    return copy.deepcopy(options)


# Whether it fits this optimizer.


def _match(number: int, here: Mapping[str, Any], there: Mapping[str, Any]) -> Sequence[Any]:
    """The saved key of each parameter of a group: by name where both sides have names, else by position."""
    keys: Sequence[Any] = there["params"]
    mine, theirs = here.get("param_names"), there.get("param_names")
    if mine and theirs:
        mine, theirs = [bare(str(name)) for name in mine], [bare(str(name)) for name in theirs]
        added = [name for name in mine if name not in theirs]
        if added:
            raise ValueError(
                f"parameter group {number} has {_some(added)}, of which the saved state knows nothing: load before "
                "they are added with add_param_group"
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
            "into a group of the same ones; new ones are added after loading, with add_param_group"
        )
    return keys


def _check_options(number: int, group: dict[str, Any], new: dict[str, Any]) -> None:
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
        check_options(group | new)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the options of parameter group {number} of the saved state are damaged: {error}") from error


def _check(name: str, saved: Any, here: State) -> None:
    """Raise unless what was saved are the tensors of a parameter's state, each in its shape."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{name}: the saved state is a {_kind(saved)}, not a dict of tensors")
    for key in saved:
        if key not in here:
            raise ValueError(f"{name}: the saved state has {key!r}, which is not in use here; was it another rule's?")
    for key, x in here.items():
        if key not in saved:
            raise ValueError(f"{name}: the saved state has no {key!r}, only {_some(saved)}; was it another rule's?")
        y = saved[key]
        if not isinstance(y, Tensor) or y.shape != x.shape:
            what = f"with shape {list(y.shape)}" if isinstance(y, Tensor) else f"as a {_kind(y)}"
            raise ValueError(f"{name}: {key!r} was saved {what}, and has shape {list(x.shape)} here")
        number = y.is_floating_point() if x.is_floating_point() else y.dtype == x.dtype
        if not number or y.layout != torch.strided or y.is_meta:
            raise ValueError(f"{name}: {key!r} was saved as {_kind(y)}, which does not go into {_kind(x)}")
        if not fits(x, y):
            raise ValueError(
                f"{name}: {key!r} was saved as another rank's part; load it with torch.distributed.checkpoint"
            )
        y = local(y)
        if key.split(".")[0] in CLOCKS and not bool(((y >= 0) & (y == y.floor()) & torch.isfinite(y)).all()):
            raise ValueError(
                f"{name}: {key!r} was saved as {y.tolist()!r}: must be a count of updates, an integer >= 0"
            )


def _check_layout(name: str, p: Tensor, here: State, group: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise unless the options ``then`` see a parameter as the same matrices, with the same state, as it is here."""
    try:
        same = _forms(_blank(p, then)) == _forms(here)
        if same and not issubclass(RULES[group["rule"]], Elementwise):
            same = _seen(p, then) == _seen(p, group)
    except Exception as error:
        raise ValueError(f"{name}: the saved options are damaged: {error}") from error
    if not same:
        changed = [k for k in option_defaults(group["rule"]) if repr(then[k]) != repr(group[k])]
        theirs = ", ".join(f"{k}={then[k]!r} (here {group[k]!r})" for k in changed)
        raise ValueError(f"{name}: the saved options see it otherwise: {theirs}; build the optimizer with those")


def _blank(p: Tensor, group: Mapping[str, Any]) -> State:
    """A parameter's state as its group's options have it, on the meta device: names, shapes and dtypes."""
    rule = RULES[group["rule"]].from_group(group)
    ghost = torch.empty(p.shape, dtype=p.dtype, device="meta")
    if isinstance(rule, Elementwise):
        return rule.init(ghost.to(state_dtype(p)))
    seats = loose(0, ghost, group)
    return {name: x for seat in seats for name, x in Stack.blank(rule, 0, seat, ghost).views(seat).items()}


def _forms(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (x.shape, x.dtype) for name, x in state.items()}


def _seen(p: Tensor, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one view of a parameter from another."""
    view = View.of(p, group)
    return view.stored, view.transpose, view.heads, [(r.start, c.start) for r, c in view.blocks], view.pieces


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return " ".join([str(x.dtype).removeprefix("torch."), *(["without values"] if x.is_meta else []), "tensor"])
    return type(x).__name__


def _some(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
