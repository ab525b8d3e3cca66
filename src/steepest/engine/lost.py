"""Gradients that are not finite: how a step learns of them, and leaves their matrices out.

On a CPU the answer is at hand. On an accelerator, asking would wait. There the gradients count as lost: masks on the
device see to it that the step leaves no trace of them, and the host hears of it one step later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from steepest.exchange.bucket import Bucket, Tensors
from steepest.stack.stack import AsyncCopy, Stack, to_device


@dataclass(frozen=True)
class Lost:
    """The matrices of a stack whose gradient counts as lost."""

    mask: Tensor
    """``[B, 1, 1]``, True for these."""
    number: Tensor
    """``[B, 1, 1]``, 1 for these and 0 for others, in the state's dtype."""


@cache
def safe_norm(dtype: torch.dtype) -> float:
    """Return the largest gradient norm whose square, whitened by the smallest floor (1e-8), is finite.

    It is 1.8e15 in float32.
    """
    return float(torch.finfo(dtype).max ** 0.5 * 1e-4)


def look_ahead(buckets: Sequence[Bucket], grads: Tensors) -> Mapping[Stack, Lost]:
    """Look at all gradients that are where they are stepped, on an accelerator, before they are gathered.

    That takes a few operations for all stacks together. Stacks are left out, and look at their own gradients, where
    these are missing, or are no matrices in memory of their own.
    """
    together: dict[Any, list[tuple[Stack, list[Tensor]]]] = {}
    for bucket in buckets:
        if any(segment.bias is not None for segment in bucket.segments):
            continue  # to join biases takes memory, which one stack at a time may have
        pieces = bucket.at_hand(grads)
        for stack in bucket.stacks:
            found = [pieces[segment.key] for segment in stack.segments if segment.key in pieces]
            if len(found) == stack.size and all(x.is_contiguous() for x in found):
                together.setdefault((stack.device, stack.dtype, found[0].dtype), []).append((stack, found))
    lost: dict[Stack, Lost] = {}
    for (_, dtype, _), members in together.items():
        stacks = [stack for stack, _ in members]
        matrices = [x for _, found in members for x in found]
        norms = torch.stack(torch._foreach_norm(matrices, 2, dtype))
        lost.update(zip(stacks, lost_among(stacks, norms, [True] * len(matrices)), strict=True))
    return lost


def lost_among(stacks: Sequence[Stack], norms: Tensor, live: Sequence[bool]) -> list[Lost]:
    """Return what is lost in stacks of one device and dtype, and advance the clocks ``t`` of all other matrices.

    Args:
        stacks: the stacks.
        norms: the norm of the gradient in each of their slots, ``[N]``.
        live: for each slot, whether it takes part in the step; the gradients of others are lost, too.
    """
    kept = torch.lt(norms, safe_norm(norms.dtype), out=torch.empty_like(norms))  # 1 and 0; 0 for NaN
    idle = None if all(live) else ~to_device(live, norms.device)
    if idle is not None:
        kept.masked_fill_(idle, 0)
    mask = kept == 0
    number, undone = mask.to(kept.dtype), AsyncCopy(mask if idle is None else mask & ~idle)
    ends = accumulate(stack.size for stack in stacks)
    parts = [slice(end - stack.size, end) for stack, end in zip(stacks, ends, strict=True)]
    torch._foreach_add_([stack.t for stack in stacks], [kept[part].view(-1, 1, 1) for part in parts])
    for stack, part in zip(stacks, parts, strict=True):
        stack.undone = undone[part]
    return [Lost(mask[part].view(-1, 1, 1), number[part].view(-1, 1, 1)) for part in parts]
