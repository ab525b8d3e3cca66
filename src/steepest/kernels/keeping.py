"""A Triton kernel that saves and restores the state of those matrices whose gradient is not finite.

    target[b] ← source[b] wherever finite[b] is False

A step must leave no trace of a gradient that is not finite, without making the host wait for the device. So state is
saved before a step and restored after it. torch's operations copy all of the state both times, at 20 bytes per entry in
float32: a copy reads 4 and writes 4, torch.where reads 8 and writes 4. A program of this kernel reads one byte of the
mask and touches its block only if the gradient is not finite. Since nearly all gradients are finite, nearly no state
moves: 1 byte per BLOCK entries, and 16 bytes per entry of a matrix that is restored.

Predicted, not measured, on an H200 at 4.8 TB/s: the state that SOAP has for the 85 million entries of GPT-2's hidden
matrices, 39 bytes each, takes 3.4 ms by torch's operations. This kernel takes launches of 10⁵ programs that end at
once, about 20 µs, and some µs for each tensor. The memory for the copies is allocated in either case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from steepest.kernels.symmetric import current_device
from steepest.linalg.untraced import untraced

BLOCK, WARPS = 8192, 8


@triton.jit  # type: ignore[untyped-decorator]
def _put_back_kernel(source, target, finite, size, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    if tl.load(finite + batch) == 0:
        entries = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = entries < size
        at = batch * size + entries
        tl.store(target + at, tl.load(source + at, mask=mask), mask=mask)


@untraced
def put_back(source: Tensor, target: Tensor, finite: Tensor) -> None:
    """Copy the slots of ``source`` where ``finite`` is False to ``target``, in place.

    Args:
        source: ``[B, ...]``, in a layout that `steepest.kernels.keeping_pays` accepts.
        target: ``[B, ...]``, in the same layout.
        finite: B bools.
    """
    size = source[0].numel()
    blocks = -(-size // BLOCK)
    mask = finite.reshape(-1).view(torch.uint8)
    with current_device(source.device):
        _put_back_kernel[(len(source) * blocks,)](source, target, mask, size, blocks, BLOCK=BLOCK, num_warps=WARPS)
