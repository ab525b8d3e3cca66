"""Triton kernels for Adam's two moments and its direction, in one pass over memory, or two with a noise floor.

    M ← β₁ M + (1-β₁) g,   V ← β₂ V + (1-β₂) g²
    m̂ = M / (1-β₁ᵗ), with Nesterov β₁ M / (1-β₁ᵗ⁺¹) + (1-β₁) g / (1-β₁ᵗ);   v̂ = V / (1-β₂ᵗ), and at least m̂²
    D = m̂ / (√v̂ + ε), with a noise floor m̂ √v̂ / (√v̂ (√v̂ + ε) + τ²/t³ mean(v̂))

The twin is `steepest.rules.parts.moments.adam`, which explains the symbols.

Tiling: a matrix of N = m n entries is cut into blocks of BLOCK entries, and at most PARTS programs share the blocks.
Without a noise floor a program writes moments and direction. With one, D needs the mean over the whole matrix: in the
first pass each program writes the moments and the sum of its v̂; in the second each program adds up all sums of its
matrix and writes D. No sum is atomic, and the order of summation depends on N alone. So a resumed run continues bit
for bit, and a matrix gets the same bits alone as in a batch. NaN and infinity stay in their matrix.

Bytes per entry, in float32: 24 without a noise floor (reads g, M, V; writes M, V, D), 32 with it (reads M, V again), 36
with Nesterov as well (reads g again). torch's single operations read and write about 100. The 15 FLOPs per entry are
negligible. Predicted, not measured, on an H200 at 4.8 TB/s: 10⁶ entries take 7 µs against 21 µs, which is near the time
of the launches themselves, and 10⁸ entries 0.67 ms against 2.1 ms.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from steepest.kernels.symmetric import current_device
from steepest.linalg.untraced import untraced

BLOCK, WARPS = 2048, 8
PARTS = 1024
"""The largest number of partial sums per matrix: a power of two, since the second pass loads all of them at once."""


@triton.jit
def _lerp(m, g, beta1, rest1):  # type: ignore[no-untyped-def]
    """β₁ M + (1-β₁) g, computed from the nearer end as in torch.lerp: exactly g where β₁ is 0."""
    return tl.where(rest1 < 0.5, m + rest1 * (g - m), g - beta1 * (g - m))


@triton.jit  # type: ignore[untyped-decorator]
def _estimates(  # type: ignore[no-untyped-def]
    g,
    m,
    v,
    t,
    beta1,
    beta2,
    rest1,  # 1 - beta1, rounded once
    log_beta1,
    log_beta2,
    CORRECT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM_FLOOR: tl.constexpr,
):
    """m̂ and v̂ of one block. 1 - βᵗ is computed in float64, since it loses four digits in float32 at β₂ = 0.999."""
    if CORRECT:
        t = t.to(tl.float64)
        v = tl.div_rn(v, (1.0 - tl.exp(t * log_beta2)).to(tl.float32))
        here = (1.0 - tl.exp(t * log_beta1)).to(tl.float32)
        if NESTEROV:
            ahead = (1.0 - tl.exp((t + 1.0) * log_beta1)).to(tl.float32)
            m = m * tl.div_rn(beta1, ahead) + g * tl.div_rn(rest1, here)
        else:
            m = tl.div_rn(m, here)
    elif NESTEROV:
        m = _lerp(m, g, beta1, rest1)
    if MOMENTUM_FLOOR:
        v = tl.maximum(v, m * m, propagate_nan=tl.PropagateNan.ALL)
    return m, v


@triton.jit  # type: ignore[untyped-decorator]
def _moments_kernel(  # type: ignore[no-untyped-def]
    g_at,  # [B, N], as are exp_avg, exp_avg_sq and direction
    exp_avg,
    exp_avg_sq,
    direction,  # unused with NOISE
    sums,  # [B, parts], unused without NOISE
    t_at,  # [B]
    size,  # N
    parts,  # programs per matrix
    beta1,
    beta2,
    rest1,
    rest2,
    log_beta1,
    log_beta2,
    eps,
    NOISE: tl.constexpr,
    CORRECT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,  # a constant, since Triton's interpreter has no loops up to a variable
):
    program = tl.program_id(0)
    batch = (program // parts).to(tl.int64)
    part = program % parts
    t = tl.load(t_at + batch)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(BLOCKS_PER_PROGRAM):
        entries = (part + i * parts) * BLOCK + tl.arange(0, BLOCK)
        mask = entries < size
        at = batch * size + entries
        g = tl.load(g_at + at, mask=mask, other=0.0)
        m = tl.load(exp_avg + at, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
        m = _lerp(m, g, beta1, rest1)
        v = beta2 * v + rest2 * g * g
        tl.store(exp_avg + at, m, mask=mask)
        tl.store(exp_avg_sq + at, v, mask=mask)
        m, v = _estimates(g, m, v, t, beta1, beta2, rest1, log_beta1, log_beta2, CORRECT, NESTEROV, MOMENTUM_FLOOR)
        if NOISE:
            total += v
        else:
            tl.store(direction + at, tl.div_rn(m, tl.sqrt_rn(v) + eps), mask=mask)
    if NOISE:
        tl.store(sums + batch * parts + part, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _direction_kernel(  # type: ignore[no-untyped-def]
    g_at,  # unused without NESTEROV
    exp_avg,
    exp_avg_sq,
    direction,
    sums,
    t_at,
    size,
    parts,
    blocks,  # per matrix
    beta1,
    beta2,
    rest1,
    log_beta1,
    log_beta2,
    eps,
    weight,  # τ² / N
    tiny,
    CORRECT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    t = tl.load(t_at + batch)
    which = tl.arange(0, PARTS)
    total = tl.sum(tl.load(sums + batch * parts + which, mask=which < parts, other=0.0), axis=0)
    floor = tl.div_rn(weight, t * t * t) * total + tiny
    entries = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = entries < size
    at = batch * size + entries
    m = tl.load(exp_avg + at, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq + at, mask=mask, other=0.0)
    g = m
    if NESTEROV:
        g = tl.load(g_at + at, mask=mask, other=0.0)
    m, v = _estimates(g, m, v, t, beta1, beta2, rest1, log_beta1, log_beta2, CORRECT, NESTEROV, MOMENTUM_FLOOR)
    root = tl.sqrt_rn(v)
    tl.store(direction + at, tl.div_rn(root * m, root * (root + eps) + floor), mask=mask)


@untraced
def adam(
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: Tensor,
    betas: tuple[float, float],
    eps: float,
    *,
    correct_bias: bool,
    nesterov: bool,
    momentum_floor: bool,
    noise_floor: float,
) -> Tensor:
    """Compute `steepest.rules.parts.moments.adam` for contiguous float32 moments ``[B, m, n]`` and ``t [B, 1, 1]``."""
    g = g.contiguous()
    direction = torch.empty_like(g)  # [B, m, n]
    batch, size = len(g), g[0].numel()
    blocks = -(-size // BLOCK)
    parts = min(blocks, PARTS)
    noise = noise_floor != 0
    sums = g.new_empty(batch, parts) if noise else g
    t = t.expand(batch, 1, 1).flatten()
    beta1, beta2, eps = (float(x) for x in (*betas, eps))  # Triton would make constants of the integers 0 and 1
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]  # exp(-∞) is 0: nothing to correct
    flags = {"CORRECT": correct_bias, "NESTEROV": nesterov, "MOMENTUM_FLOOR": momentum_floor}
    with current_device(g.device):
        _moments_kernel[(batch * parts,)](
            *(g, exp_avg, exp_avg_sq, direction, sums, t, size, parts),
            *(beta1, beta2, 1 - beta1, 1 - beta2, *logs, eps),
            NOISE=noise,
            **flags,
            BLOCK=BLOCK,
            BLOCKS_PER_PROGRAM=-(-blocks // parts),
            num_warps=WARPS,
        )
        if noise:
            weight, tiny = noise_floor**2 / size, torch.finfo(torch.float32).tiny
            _direction_kernel[(batch * blocks,)](
                *(g, exp_avg, exp_avg_sq, direction, sums, t, size, parts, blocks),
                *(beta1, beta2, 1 - beta1, *logs, eps, weight, tiny),
                **flags,
                BLOCK=BLOCK,
                PARTS=PARTS,
                num_warps=WARPS,
            )
    return direction
