"""Symmetric products, at little more than half the cost of general ones.

Only the blocks on and below the diagonal are multiplied, and then mirrored: by torch on a CPU, and on a GPU by a Triton
kernel where `steepest.kernels` expects it to be faster. Other products are torch's whole ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest import kernels
from steepest.kernels.precision import INTERPRETED

BLOCK = 64
"""The least number of rows per block on a CPU. There are at most four blocks."""
ENTRIES = 2**16
"""The number of entries of a factor from which products are computed in blocks, which are slower for smaller ones."""


def accumulate_gram(
    K: Tensor,
    X: Tensor,
    beta: float | Tensor,
    scale: float = 1.0,
    weights: Tensor | None = None,
) -> None:
    """Compute ``K ← β K + (1-β) · scale · X diag(weights) Xᵀ`` in place.

    On a CPU, an X of 2¹⁶ entries or more is multiplied in blocks, which takes 0.79 to 0.86 of the time of the whole
    product, at 128 to 1024 rows by 256 to 1024 columns.

    Args:
        K: ``[..., d, d]``, symmetric.
        X: ``[..., d, n]``.
        beta: a number, or one per matrix ``[..., 1, 1]``.
        scale: a factor of the product.
        weights: nonnegative weights of X's columns, ``[..., n]``; by default 1.

    Example:
        >>> import torch
        >>> K = torch.eye(2)
        >>> accumulate_gram(K, torch.tensor([[1.0], [2.0]]), beta=0.5)
        >>> K
        tensor([[1.0000, 1.0000],
                [1.0000, 2.5000]])
    """
    if K.dim() != 3:
        K = K.view(-1, *K.shape[-2:])  # a view: the update must reach the caller's tensor
        X = X.reshape(-1, *X.shape[-2:])
        beta = beta.reshape(-1, 1, 1) if isinstance(beta, Tensor) else beta
    if weights is not None:
        weights = weights.reshape(-1, 1, weights.shape[-1])
    if (INTERPRETED or not X.is_cpu) and K.dtype == X.dtype and kernels.product_pays(X):
        from steepest.kernels.symmetric import ema_syrk

        ema_syrk(K, X if weights is None else X * weights.sqrt(), beta, (1 - beta) * scale)
        return
    Y = X if weights is None else X * weights
    if isinstance(beta, Tensor) and scale != 1:  # of which the product itself knows nothing
        Y = X * (scale if weights is None else scale * weights)
    blocks = _blocks(K.shape[-1]) if _in_blocks(X) else [(0, K.shape[-1])]
    for start, stop in blocks:
        block, rows, columns = K, Y, X.mT
        if len(blocks) > 1:
            block, rows, columns = K[:, start:stop, :stop], Y[:, start:stop], columns[..., :stop]
        if isinstance(beta, Tensor):
            torch.lerp(torch.bmm(rows, columns), block, beta.to(K.dtype), out=block)
        else:
            block.baddbmm_(rows, columns, beta=beta, alpha=(1 - beta) * scale)
        if start:
            _mirror(K, start, stop)


def gram(X: Tensor) -> Tensor:
    """Return the Gram matrix ``X Xᵀ`` for a matrix ``X [d, n]`` or a batch ``[N, d, n]``.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[ 5., 11.],
            [11., 25.]])
    """
    if (INTERPRETED or not X.is_cpu) and kernels.product_pays(X):
        return _by_kernel(X, X, None, 1.0, 1.0)
    return _product(X, X.mT, None, 1.0, 1.0)


def symmetric_product(A: Tensor, B: Tensor, C: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return ``β C + α A B`` where ``A B``, B and C are symmetric, as polynomials of one symmetric matrix are.

    With blocks, as in `accumulate_gram`, five quintic steps of `steepest.linalg.polar` take 0.91 of the time at 512
    rows, 0.76 at 768, 0.77 at 1024 (float32, square, one CPU thread; docs/kernels.md).

    Args:
        A: ``[d, d]`` or ``[N, d, d]``.
        B: of A's shape.
        C: of A's shape, or None for zero.
        beta: the factor of C.
        alpha: the factor of the product; 1 without C.

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> symmetric_product(A, A, A, beta=3.0, alpha=2.0)
        tensor([[2., 3.],
                [3., 2.]])
    """
    if (INTERPRETED or not A.is_cpu) and kernels.product_pays(A):
        return _by_kernel(A, B, C, beta, alpha)  # with B for Bᵀ, since the kernel reads rows faster than columns
    return _product(A, B, C, beta, alpha)


def triangle_product(R: Tensor, U: Tensor) -> Tensor:
    """Return the symmetric product ``R U`` of an upper triangular R and U, ``[..., d, d]``, symmetric to the last bit.

    Entries below R's diagonal are not read. The half on and below the result's diagonal is computed, whose sums have
    the fewest terms: where the rows of R decrease, as in an eigenbasis, small entries are not differences of large
    ones. On a CPU, from 256 rows on, products with zeros are left out; four blocks compute 5/16 of all products.

    Example:
        >>> U = torch.tensor([[0.6, 0.8], [0.8, -0.6]])
        >>> triangle_product(torch.tensor([[5.0, 8.0], [0.0, -1.0]]), U)  # U R is [[3, 4], [4, 7]]
        tensor([[ 9.4000, -0.8000],
                [-0.8000,  0.6000]])
    """
    if not _in_blocks(R):
        return mirrored(R.triu() @ U)
    d = R.shape[-1]
    Rt, Ut = R.reshape(-1, d, d).mT, U.reshape(-1, d, d).mT  # their rows are contiguous if R and U come from LAPACK
    out = R.new_empty(len(Rt), d, d)
    for start, stop in _blocks(d):
        above = Ut[:, :stop, start:] @ Rt[:, start:, start:stop].tril()  # rows start:stop, transposed
        out[:, start:stop, :start] = above[:, :start].mT
        out[:, :start, start:stop] = above[:, :start]
        out[:, start:stop, start:stop] = mirrored(above[:, start:].mT)
    return out.view(U.shape)


def mirrored(A: Tensor) -> Tensor:
    """Return ``A [..., d, d]`` with the entries below its diagonal mirrored above it.

    >>> mirrored(torch.tensor([[1.0, 5.0], [2.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    lower = A.tril()
    return lower + lower.tril(-1).mT


def _by_kernel(X: Tensor, Y: Tensor, C: Tensor | None, beta: float, alpha: float) -> Tensor:
    """``β C + α X Yᵀ``."""
    from steepest.kernels.symmetric import symmetric_product

    if X.dim() == 3:
        return symmetric_product(X, Y, C, beta, alpha)
    return symmetric_product(X[None], Y[None], None if C is None else C[None], beta, alpha)[0]


def _product(A: Tensor, B: Tensor, C: Tensor | None, beta: float, alpha: float) -> Tensor:
    """``β C + α A B``, symmetric."""
    if A.dim() == 3 and A.dtype.itemsize > 2 and _in_blocks(A):
        d = A.shape[-2]
        out = A.new_empty(len(A), d, d)
        for start, stop in _blocks(d):
            block = out[:, start:stop, :stop]  # in place: a product of its own would have to be copied
            if C is not None:
                block.copy_(C[:, start:stop, :stop])
            block.baddbmm_(A[:, start:stop], B[..., :stop], beta=0 if C is None else beta, alpha=alpha)
            _mirror(out, start, stop)
        return out
    return plus_product(C, A, B, beta, alpha)


def plus_product(C: Tensor | None, A: Tensor, B: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return ``β C + α A B`` for matrices or batches, or ``A B`` without C.

    >>> plus_product(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2, 1), beta=3.0)
    tensor([[5.]])
    """
    if C is None:
        return A @ B
    add = torch.addmm if C.dim() == 2 else torch.baddbmm
    return add(C, A, B, beta=beta, alpha=alpha)


def _in_blocks(A: Tensor) -> bool:
    """Whether a product of ``A [..., d, n]`` is computed in blocks."""
    d, n = A.shape[-2:]
    return A.device.type == "cpu" and d >= 2 * BLOCK and d * n >= ENTRIES


def _blocks(d: int) -> list[tuple[int, int]]:
    """The first row and the end of each block.

    >>> _blocks(130), _blocks(1024)[-1]
    ([(0, 65), (65, 130)], (768, 1024))
    """
    size = -(-d // min(d // BLOCK, 4))
    return [(start, min(start + size, d)) for start in range(0, d, size)]


def _mirror(K: Tensor, start: int, stop: int) -> None:
    """Write the transpose of the blocks to the left of a diagonal block above it."""
    if start:
        K[:, :start, start:stop] = K[:, start:stop, :start].mT
