"""Another optimizer's state, one parameter after the other, and which parameter here each one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steepest.stack.names import bare, parameter_names


class NoCounterpart(Exception):
    """The reason why a parameter starts fresh; no error."""


@dataclass(frozen=True)
class Saved:
    """A saved parameter is the entries and the options that another optimizer kept for it."""

    name: str
    """Its name, or its position if it has none."""
    entries: Mapping[Any, Any]
    options: Mapping[str, Any]
    group: int

    def tensor(self, value: Any, what: str, shape: Sequence[int]) -> Tensor:
        """Return an entry as a tensor, in float32 at least.

        Raises:
            ValueError: if it is none of this shape.
        """
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{self.name}: {what!r} was saved as a {kind}: must be a dense tensor of floats")
        if hasattr(value, "to_local"):
            raise ValueError(f"{self.name}: {what!r} was saved in shards: save it whole, and adopt it in one process")
        if value.shape != torch.Size(shape):
            raise ValueError(
                f"{self.name}: {what!r} was saved with shape {list(value.shape)}, and must have {list(shape)}"
            )
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))

    def like(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return the entry of this name, which has the parameter's shape."""
        return self.tensor(self.entries[name], name, shape)

    def option(self, name: str) -> Any:
        """Return an option of the saved group.

        Raises:
            ValueError: if it is missing.
        """
        if name not in self.options:
            raise ValueError(f"{self.name}: its group was saved without {name!r}")
        return self.options[name]

    def count(self, name: str) -> int:
        """Return a number of updates, which optimizers count for each parameter or for its whole group.

        Raises:
            ValueError: if it is no count, or missing.
        """
        value = self.entries.get(name, self.options.get(name))
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(number, int | float) or isinstance(number, bool) or not number >= 0 or number % 1:
            raise ValueError(f"{self.name}: {name!r} was saved as {value!r}: must be a count of updates")
        return int(number)


def saved_parameters(state_dict: Any, names: Sequence[str] | None) -> tuple[list[Saved], bool]:
    """Return the parameters of a saved state in its order, and whether they have names.

    Args:
        state_dict: of any optimizer that is built like torch's.
        names: the names of its parameters, which take precedence over those that it holds.

    Raises:
        ValueError: if it is no such state, or if there is not one name for each parameter.
    """
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        raise ValueError("the saved state must be a dict with 'state' and a list of 'param_groups'")
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"parameter group {number} of the saved state is not a dict with a list of 'params'")
        if "rule" in group:
            raise ValueError("the saved state is one of steepest: load it with load_state_dict")
    names = _names(groups, names)
    found: list[Saved] = []
    for number, group in enumerate(groups):
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        for key in group["params"]:
            name = names[len(found)] if names else f"parameter {len(found)} of the saved state"
            entries = state.get(key, {})
            if not isinstance(entries, Mapping):
                raise ValueError(f"{name}: its state was saved as a {type(entries).__name__}: must be a dict")
            found.append(Saved(name, entries, options, number))
    return found, names is not None


def _names(groups: Sequence[Mapping[str, Any]], given: Sequence[str] | None) -> list[str] | None:
    """Return a name for each saved parameter: the given ones, or those that the groups have; None if they have none."""
    held = [name for group in groups for name in group.get("param_names") or group["params"]]
    if given is None and not all(isinstance(name, str) for name in held):
        return None
    names = bare(held if given is None else given)
    if len(names) != (count := sum(len(group["params"]) for group in groups)):
        raise ValueError(f"names: there are {len(names)}, and the saved state has {count} parameters")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"names: {twice[0]} is the name of more than one parameter of the saved state")
    return names


def match(groups: Sequence[Mapping[str, Any]], saved: Sequence[Saved], named: bool) -> dict[Tensor, Saved]:
    """Return which saved parameter each parameter here is: by name if both sides have names, else by position.

    By name, parameters may be missing on either side.

    Raises:
        ValueError: if there is no telling.
    """
    mine = parameter_names(groups)
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    if named and all(group.get("param_names") for group in groups):
        by_name = {one.name: one for one in saved}
        found = {p: by_name[name] for name, p in zip(mine, params, strict=True) if name in by_name}
        if not found:
            raise ValueError(f"no name is on both sides: there {_some(by_name)}; here {_some(mine)}")
        return found
    remedy = "adopt by name: build this optimizer from named parameters, and pass the names of the saved ones"
    if len(saved) != len(params):
        raise ValueError(f"the saved state has {len(saved)} parameters, the optimizer has {len(params)}: {remedy}")
    if [len(group["params"]) for group in groups] != list(Counter(one.group for one in saved).values()):
        seen: dict[torch.Size, str] = {}
        for name, p in zip(mine, params, strict=True):
            if p.shape in seen:
                raise ValueError(
                    f"the saved state has other groups, so parameters may come in another order, and {seen[p.shape]} "
                    f"and {name} have the same shape: {remedy}"
                )
            seen[p.shape] = name
    labels = [f"{one.name}, by its position {name}" for name, one in zip(mine, saved, strict=True)]
    return {p: replace(one, name=label) for label, p, one in zip(labels, params, saved, strict=True)}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
