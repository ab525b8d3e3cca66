"""Parameters that another library cuts into flat parts, in which no matrix can be seen.

FSDP1 and DeepSpeed's ZeRO lay parameters end to end, and each rank keeps a part of that line. A matrix rule would take
its part for a vector. Elementwise rules see nothing but entries, so they may step flat parts.
"""

from __future__ import annotations

from torch import Tensor

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
