"""Saving and loading: slots of stacks to a `state_dict` and back, bit for bit.

A saved state is plain: per parameter a dict of tensors, per group flat options. It can be loaded under
``torch.load(weights_only=True)``, and by parameter name in another order. Options that are functions (a schedule for
the refresh frequency) are not saved; the loading optimizer keeps its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from steepest.optimizer import Optimizer


def detached(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with tensors of its own, no views into stacks, and no functions among the options."""
    state = {key: {name: x.clone() for name, x in named.items()} for key, named in state_dict["state"].items()}
    groups = [{k: v for k, v in group.items() if not callable(v)} for group in state_dict["param_groups"]]
    return state_dict | {"state": state, "param_groups": groups}


def load(optimizer: Optimizer, state_dict: dict[str, Any], check_options: Callable[[Mapping[str, Any]], None]) -> None:
    """Check a state_dict against the optimizer as a whole, then copy it in; see `Optimizer.load_state_dict`."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced

    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"what was saved has no 'state' and 'param_groups', only {_some(state_dict)}")
    pairs = _match(optimizer, state_dict)
    saved = {p: state_dict["state"][key] for p, key in pairs if state_dict["state"].get(key)}
    names = {p: f"parameter {key}" for p, key in pairs}
    for group in optimizer.param_groups:
        names |= dict(zip(group["params"], group.get("param_names", ()), strict=False))
    missing = [names[p] for p in optimizer.state if optimizer.state[p] and p not in saved]
    if missing:
        raise ValueError(f"the saved state has nothing for {_some(missing)}; load it into the optimizer that it is of")
    options = [_options(group) for group in state_dict["param_groups"]]
    for number, (group, new) in enumerate(zip(optimizer.param_groups, options, strict=True)):
        if new.get("rule", group["rule"]) != group["rule"]:
            raise ValueError(
                f"parameter group {number} was saved under {new['rule']!r}, and is under {group['rule']!r}"
            )
        check_options(group | new)
    optimizer._welcome(also=set(saved))
    for p, tensors in saved.items():
        _check(names[p], tensors, optimizer.state[p])

    for p, tensors in saved.items():
        for name, x in optimizer.state[p].items():
            x.copy_(tensors[name])
    for group, new in zip(optimizer.param_groups, options, strict=True):
        group.update(new)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group's options, as values of their own: the saver may go on changing a tensor learning rate."""
    return copy.deepcopy({k: v for k, v in group.items() if k not in ("params", "param_names")})


def _match(optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[Tensor, Any]]:
    """Each parameter here with its key there: by name where both sides have names, else by position."""
    here, there = optimizer.param_groups, state_dict["param_groups"]
    if len(here) != len(there):
        raise ValueError(f"the saved state has {len(there)} parameter groups, the optimizer has {len(here)}")
    pairs = []
    for number, (group, saved) in enumerate(zip(here, there, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"parameter group {number} was saved with {len(saved['params'])} parameters and has "
                f"{len(group['params'])} here"
            )
        keys = saved["params"]
        if group.get("param_names") and saved.get("param_names"):
            by_name = dict(zip(saved["param_names"], keys, strict=True))
            unknown = [name for name in group["param_names"] if name not in by_name]
            if unknown:
                raise ValueError(f"the saved state's group {number} has no {_some(unknown)}")
            keys = [by_name[name] for name in group["param_names"]]
        pairs += list(zip(group["params"], keys, strict=True))
    return pairs


def _check(name: str, saved: Any, here: dict[str, Tensor]) -> None:
    """Raise unless what was saved are the tensors of a parameter's state, each in its shape."""
    for key in saved:
        if key not in here:
            raise ValueError(f"{name}: the saved state has {key!r}, which is not in use here; was it another rule's?")
    for key, x in here.items():
        if key not in saved:
            raise ValueError(f"{name}: the saved state has no {key!r}, only {_some(saved)}; was it another rule's?")
        if getattr(saved[key], "shape", None) != x.shape:
            shape = list(saved[key].shape) if isinstance(saved[key], Tensor) else type(saved[key]).__name__
            raise ValueError(f"{name}: {key!r} was saved with shape {shape}, and has {list(x.shape)} here")


def _some(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
