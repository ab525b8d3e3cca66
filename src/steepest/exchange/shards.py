"""The shard of a tensor that this rank holds: where it lies in the whole tensor, and how values are copied into it.

A plain tensor is whole. Of a DTensor a rank holds a shard, and of state that lives on one rank (`dtensor.Owned`)
everything or nothing. DTensors are imported only where one is met, because importing them takes half a second.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""The types of most tensors; they are compared first, since a step asks for each tensor several times."""


def is_dtensor(x: Tensor) -> bool:
    """Return whether ``x`` is a DTensor."""
    return type(x) not in PLAIN and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """Return what this rank holds of ``x``: the tensor itself, or its shard of a DTensor."""
    if type(x) in PLAIN or not hasattr(x, "to_local"):
        return x
    shard: Tensor = x.to_local()
    return shard


def local_gradient(p: Tensor) -> Tensor:
    """Return the shard of p's gradient that belongs to this rank's shard of ``p``.

    If the rank holds nothing of ``p``, and so got no gradient, the shard is empty.
    """
    if p.grad is None:
        return torch.zeros_like(local(p))
    if is_dtensor(p) and p.grad.placements != p.placements:  # type: ignore[attr-defined]
        return local(p.grad.redistribute(placements=p.placements))  # type: ignore[attr-defined]
    return local(p.grad)


def meta_shard(x: Tensor) -> Tensor:
    """Return this rank's shard of a tensor like ``x`` on the meta device: its strides and offset tell where it lies.

    >>> meta_shard(torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    return torch.empty(x.shape, device="meta")[_slices(x)]


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """Return ``x``, which has a row for each row of this rank's shard of ``p``, as a shard of a DTensor like ``p``."""
    if not is_dtensor(p) or p.device_mesh.size() == 1:  # type: ignore[attr-defined]
        return x
    from steepest.exchange import dtensor

    return dtensor.shard_like(p, x)


def fits(here: Tensor, saved: Tensor) -> bool:
    """Return whether this rank's shard of ``here`` can be read from ``saved``, which is whole or in the same shards."""
    return not is_dtensor(saved) or local(here).shape == local(saved).shape


def copy_into(here: Tensor, saved: Tensor) -> None:
    """Copy values into this rank's shard of ``here``, if it has one, from a tensor that `fits`."""
    mine, theirs = local(here), local(saved)
    if mine.numel():
        mine.copy_(theirs if theirs.shape == mine.shape else theirs[_slices(here)])


def _slices(x: Tensor) -> tuple[slice, ...]:
    """Return the slices that cut this rank's shard out of the whole tensor."""
    if not is_dtensor(x):
        return tuple(slice(0, n) for n in x.shape)
    from steepest.exchange import dtensor

    return dtensor.own_shard(x).slices
