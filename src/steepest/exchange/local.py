"""The exchange of one process: every stack is computed where its parameters are.

Gradients are copied into one tensor a stack, and directions are handed back as views. An exchange across ranks is the
same two functions with communication in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.stacks import Seat, Stack


def gather(stack: Stack, tensors: Sequence[Tensor | None]) -> Tensor:
    """One tensor per seat, each of its parameter's shape, as one stack ``[B, m, n]`` of the state's dtype.

    Slots whose tensor is None are left unset: nobody may read them.
    """
    out = torch.empty(stack.size, *stack.shape, dtype=stack.dtype, device=stack.device)
    there = [(seat, x) for seat, x in zip(stack.seats, tensors, strict=True) if x is not None]
    if there:
        torch._foreach_copy_(
            [out[seat.slots] for seat, _ in there], [seat.view.matrices(x, seat.piece) for seat, x in there]
        )
    return out


def scatter(D: Tensor, seats: Sequence[Seat]) -> list[Tensor]:
    """The directions ``D [B, m, n]`` of some seats, each in the shape of the window that it moves."""
    return [seat.view.shaped(D[seat.slots], seat.piece) for seat in seats]
