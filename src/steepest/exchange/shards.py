"""What a rank holds of a tensor, where that lies in the whole, and how values get there.

A plain tensor is whole. Of a DTensor a rank holds a part; of state that lives on one rank (`compat.Owned`), all or
nothing. torch.distributed is imported only where something of it is met: its DTensors take half a second to import.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""What most tensors are; asked first, since a step asks for each tensor several times."""


def local(x: Tensor) -> Tensor:
    """What this rank holds of ``x``: itself, or its part of a DTensor."""
    part: Tensor = x.to_local() if is_shared(x) else x  # type: ignore[attr-defined]
    return part


def is_shared(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor."""
    return type(x) not in PLAIN and hasattr(x, "to_local")


def where(x: Tensor) -> tuple[slice, ...]:
    """Where in the whole the part lies that this rank holds."""
    if not is_shared(x):
        return tuple(slice(0, n) for n in x.shape)
    from steepest.exchange import compat

    start, shape = compat.box(x)
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def place(x: Tensor) -> Tensor:
    """This rank's part of a tensor of the shape of ``x`` on the meta device: its strides and offset say where it lies.

    >>> place(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    return torch.empty(x.shape, device="meta")[where(x)]


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """``x``, which has a row for each that this rank holds of ``p``, as its part of a tensor in shards like ``p``."""
    if not is_shared(p) or p.device_mesh.size() == 1:  # type: ignore[attr-defined]
        return x
    from steepest.exchange import compat

    return compat.shard_like(p, x)


def fits(here: Tensor, saved: Tensor) -> bool:
    """Whether this rank's part of ``here`` can be had from ``saved``: it is whole, or in the same parts."""
    return not is_shared(saved) or local(here).shape == local(saved).shape


def put(here: Tensor, saved: Tensor) -> None:
    """Copy into this rank's part of ``here``, if it has one, from a tensor that `fits`."""
    mine, theirs = local(here), local(saved)
    if mine.numel():
        mine.copy_(theirs if theirs.shape == mine.shape else theirs[where(here)])
