"""Parameters that another library cuts into flat parts, in which no matrix can be seen.

FSDP1 and DeepSpeed's ZeRO lay parameters end to end, and each rank keeps a part of that line. A matrix rule would take
its part for a vector. Elementwise rules see nothing but entries, so they may step flat parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from steepest.rule import Rule
from steepest.rules import RULES
from steepest.stack.names import parameter_name

MARKS = {"_fsdp_flattened": "FSDP1", "ds_id": "DeepSpeed's ZeRO", "_hp_mapping": "DeepSpeed's ZeRO"}
"""The attributes that these libraries leave on parameters that they cut."""


def refuse_flat(p: Tensor, name: str, rule: str, dims: int = 0) -> None:
    """Raise if ``p``, which a matrix rule is to step, is cut into flat parts.

    It is if a library has marked it, or if it is a vector now and had ``dims`` dimensions before.

    Raises:
        ValueError: with the remedy.
    """
    library = next((library for mark, library in MARKS.items() if hasattr(p, mark)), None)
    if library or p.dim() < 2 <= dims:
        raise ValueError(
            f"{name} of shape {list(p.shape)} is cut into flat parts by {library or 'a library'}, and {rule} needs "
            "matrices: shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps them"
        )


def refuse_flattened(groups: Iterable[Mapping[str, Any]], dims: Iterable[int]) -> None:
    """Raise if flat parts have come into the place of matrices since state was laid out for them.

    Args:
        groups: parameters and options.
        dims: the number of dimensions that each parameter had then, in all groups after one another.
    """
    places = [(group, number, i) for number, group in enumerate(groups) for i in range(len(group["params"]))]
    for (group, number, i), before in zip(places, dims, strict=False):  # parts may be fewer than parameters
        if issubclass(RULES[group["rule"]], Rule):
            refuse_flat(group["params"][i], parameter_name(group, number, i), group["rule"], before)
