"""Triton kernels for symmetric products, which compute half of the tiles and mirror them.

    K ← β K + α X Xᵀ          `ema_syrk`, in place: the update of a covariance
    C = β O + α X Yᵀ          `symmetric_product`, where X Yᵀ is symmetric: b A + c A A of Newton-Schulz

Tiling: there is one program per tile of BLOCK × BLOCK on or below the diagonal, T (T + 1) / 2 of them for
T = ⌈d / BLOCK⌉, times the batch. A program runs along k in slices of BLOCK_K, sums in float32 registers, adds β times
the old tile, and writes the tile and its mirror image. It reads only entries on and below the diagonal of the old
matrix, and entry (j, i) is a copy of (i, j), so results are symmetric to the last bit. The old matrix and the result
may be the same memory, since no program reads what another writes.

Rounding: the order of summation depends on d, k, dtype and precision alone, by which tiles are chosen (`tiles`), and
never on timing. So a resumed run continues bit for bit, and a matrix gets the same bits alone as in a batch. NaN and
infinity stay in their matrix.

FLOPs: d (d + BLOCK) k, against 2 d² k of the whole product. Bytes: the old half and the new whole, 6 d² in float32
(torch.baddbmm_: 8 d²), and X once, 4 d k, while the L2 cache holds it. Predicted, not measured, on an H200 (4.8 TB/s;
dense TFLOP/s: 67 float32 without tensor cores, 495 TF32, 990 bfloat16) at these limits, for d = k:

  d            2048             4096             8192
  bfloat16     0.009 ms         0.072 ms         0.56 ms
  TF32         0.018 ms         0.14 ms          1.13 ms
  float32      0.13 ms          1.0 ms           8.3 ms

At d = k all of them are bound by FLOPs (bytes at d = 4096: 0.035 ms in float32); TF32 is bound by bytes for k below
about 600. One matrix of d = 2048 has 136 tiles of 128 for 132 multiprocessors, which take two rounds, as the 256 tiles
of the whole product do. So a single matrix of that size gains nothing, but a batch does.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steepest.kernels.precision import INTERPRETED, product_precision
from steepest.linalg.untraced import untraced


@dataclass(frozen=True)
class Tiles:
    """The tiling of a product, which needs 2 · block · block_k · itemsize · stages bytes of shared memory."""

    block: int
    block_k: int
    warps: int
    stages: int


LARGE = 1024
"""The number of rows from which tiles are large. With fewer rows, too few of them keep the multiprocessors busy."""


def tiles(d: int, precision: str) -> Tiles:
    """Return the tiling for d rows at the precision "bfloat16", "tf32" or "float32".

    Compiled for an H200's sm_90, no register spills. Large tiles take 96 KiB of the 227 KiB of shared memory (99 KiB on
    smaller GPUs) and about 200 registers per thread, which leaves one program per multiprocessor; small tiles take
    48 KiB and 130 registers, which leaves three or four. docs/kernels.md has the table.
    """
    if precision == "float32":  # without tensor cores operands are in registers, and a larger tile would spill
        return Tiles(block=64, block_k=16, warps=8, stages=3)
    block_k = 64 if precision == "bfloat16" else 32
    if d < LARGE:
        return Tiles(block=64, block_k=block_k, warps=4, stages=3)
    return Tiles(block=128, block_k=block_k, warps=8, stages=3)


@triton.jit  # type: ignore[untyped-decorator]
def _symmetric_kernel(  # type: ignore[no-untyped-def]
    out,  # [B, d, d]
    old,  # [B, d, d], or anything without HAS_OLD
    x,  # [B, d, k]
    y,  # [B, d, k]
    alpha,  # a number, or [B]
    beta,  # likewise
    d,
    k,
    count,  # tiles per matrix
    out_batch,
    out_row,
    out_col,
    old_batch,
    old_row,
    old_col,
    x_batch,
    x_row,
    x_col,
    y_batch,
    y_row,
    y_col,
    HAS_OLD: tl.constexpr,
    PER_MATRIX: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # a constant, since the interpreter has no loops up to a variable; every k is compiled anew
):
    program = tl.program_id(0)
    batch = (program // count).to(tl.int64)
    tile = program % count
    # Tile number i (i + 1) / 2 + j is in row i and column j. The root is rounded, which the next two lines correct.
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    j = tile - i * (i + 1) // 2

    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    along = tl.arange(0, BLOCK_K)
    x_at = x + batch * x_batch + rows[:, None] * x_row + along[None, :] * x_col  # [BLOCK, BLOCK_K]
    y_at = y + batch * y_batch + along[:, None] * y_col + cols[None, :] * y_row  # [BLOCK_K, BLOCK]
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(SLICES):
        inside = along < k - step * BLOCK_K
        a = tl.load(x_at, mask=(rows[:, None] < d) & inside[None, :], other=0.0)
        b = tl.load(y_at, mask=inside[:, None] & (cols[None, :] < d), other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_at += BLOCK_K * x_col
        y_at += BLOCK_K * y_col

    if PER_MATRIX:
        total = total * tl.load(alpha + batch)
    else:
        total = total * alpha
    lower = (rows[:, None] < d) & (cols[None, :] <= rows[:, None])
    if HAS_OLD:
        old_at = old + batch * old_batch + rows[:, None] * old_row + cols[None, :] * old_col
        before = tl.load(old_at, mask=lower, other=0.0).to(tl.float32)
        if PER_MATRIX:
            total += tl.load(beta + batch) * before
        else:
            total += beta * before
    result = total.to(out.dtype.element_ty)
    tl.store(out + batch * out_batch + rows[:, None] * out_row + cols[None, :] * out_col, result, mask=lower)
    # Strictly above the diagonal, in diagonal tiles too, whose halves may have been rounded differently.
    upper = (rows[None, :] < d) & (cols[:, None] < rows[None, :])
    mirror = out + batch * out_batch + cols[:, None] * out_row + rows[None, :] * out_col
    tl.store(mirror, tl.trans(result), mask=upper)


@untraced  # a graph break: torch.compile does not trace the launch
def ema_syrk(K: Tensor, X: Tensor, beta: float | Tensor, alpha: float | Tensor) -> None:
    """Compute ``K ← β K + α X Xᵀ`` in place.

    Args:
        K: ``[B, d, d]``, symmetric; only entries on and below the diagonal are read.
        X: ``[B, d, k]`` of any strides, in K's dtype or bfloat16.
        beta: a number, or one per matrix ``[B, 1, 1]``. The number 0 ignores what K holds, NaN included.
        alpha: a number, or one per matrix ``[B, 1, 1]``; a tensor if beta is one.
    """
    _launch(K, None if isinstance(beta, float | int) and beta == 0 else K, X, X, beta, alpha)


@untraced
def symmetric_product(X: Tensor, Y: Tensor, old: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return ``β O + α X Yᵀ`` where ``X Yᵀ`` is symmetric, as ``[B, d, d]`` in X's dtype.

    Args:
        X: ``[B, d, k]`` of any strides.
        Y: ``[B, d, k]`` of any strides, in X's dtype: X itself, or a symmetric matrix that commutes with a symmetric X.
        old: the symmetric matrix O ``[B, d, d]``, or None for zero.
        beta: the factor of O.
        alpha: the factor of the product.
    """
    out = X.new_empty(len(X), X.shape[-2], X.shape[-2])
    _launch(out, old, X, Y, beta, alpha)
    return out


def _launch(
    out: Tensor,
    old: Tensor | None,
    X: Tensor,
    Y: Tensor,
    beta: float | Tensor,
    alpha: float | Tensor,
    precision: str | None = None,
    tiling: Tiles | None = None,
) -> None:
    batch, d, k = X.shape
    precision = precision or product_precision(X)
    tiling = tiling or tiles(d, precision)
    if precision == "tf32":
        # Tensor cores read TF32 along k only, and a transpose in the kernel prevents asynchronous loads.
        X, Y = (Z if Z.stride(-1) == 1 else Z.contiguous() for Z in ((X, X) if Y is X else (X, Y)))
    per_matrix = isinstance(alpha, Tensor)
    if per_matrix:
        alpha, beta = (torch.as_tensor(c, device=X.device).float().expand(batch, 1, 1).flatten() for c in (alpha, beta))
    else:
        alpha, beta = float(alpha), float(beta)
    source = out if old is None else old
    count = math.comb(-(-d // tiling.block) + 1, 2)
    with current_device(X.device):
        _symmetric_kernel[(batch * count,)](
            *(out, source, X, Y, alpha, beta, d, k, count),
            *(stride for x in (out, source, X, Y) for stride in x.stride()),
            HAS_OLD=old is not None,
            PER_MATRIX=per_matrix,
            PRECISION="ieee" if precision == "float32" else "tf32",  # ignored for bfloat16
            UPCAST=INTERPRETED,  # NumPy has no bfloat16, whose products are exact in float32
            BLOCK=tiling.block,
            BLOCK_K=tiling.block_k,
            SLICES=-(-k // tiling.block_k),
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one inside a ``with`` block, since Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def trial(device: torch.device) -> None:
    """Compile and run the tiles that need most shared memory on a tiny product; raise an error if that fails."""
    for precision, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32)):
        X = torch.ones(1, 16, 16, dtype=dtype, device=device)
        out = torch.zeros_like(X)
        _launch(out, None, X, X, 0.0, 1.0, precision, tiles(LARGE, precision))
        if not bool((out == 16).all()):
            raise RuntimeError(f"a product of ones in {precision} is wrong")
