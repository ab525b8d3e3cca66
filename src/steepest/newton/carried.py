"""Vectors over all parameters that follow them, when parameters are reordered, and in saved states by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Mapping[str, Any]]


def columns(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Return where the entries of the parameters ``new`` stand in a vector that joins ``old``, as indices ``[P]``.

    >>> a, b = torch.zeros(2), torch.zeros(3)
    >>> columns([a, b], [b, a])
    tensor([2, 3, 4, 0, 1])
    """
    ends = torch.tensor([p.numel() for p in old], device="cpu").cumsum(0).tolist()
    stands = {p: torch.arange(end - p.numel(), end, device=p.device) for p, end in zip(old, ends, strict=True)}
    return torch.cat([stands[p] for p in new])


def matched(groups: Groups, state_dict: Any) -> dict[Any, Tensor]:
    """Return the parameter for each key of a saved state, in the saved order: by name, or by position without names.

    Raises:
        ValueError: if the saved groups are others.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("the saved state has no 'state' and 'param_groups'")
    saved_groups = state_dict["param_groups"]
    sizes, mine = ([len(group["params"]) for group in each] for each in (saved_groups, groups))
    if sizes != mine:
        raise ValueError(f"the saved groups have {sizes} parameters, the optimizer's groups have {mine}")
    found: dict[Any, Tensor] = {}
    for number, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        params = list(group["params"])
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if names and saved_names:
            if sorted(names) != sorted(saved_names):
                absent = sorted({*names} ^ {*saved_names})
                raise ValueError(f"group {number} of the saved state has other parameters: {absent[0]} is in one only")
            by_name = dict(zip(names, params, strict=True))
            params = [by_name[name] for name in saved_names]
        found |= dict(zip(saved["params"], params, strict=True))
    return found
