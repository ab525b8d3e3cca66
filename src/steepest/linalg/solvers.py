"""Solvers let an eigenbasis follow its matrix as that drifts.

Each solver takes ``K [..., d, d]``, symmetric positive semidefinite, its last basis ``Q [..., d, d]``, and a number of
iterations. It returns ``(Q, order)``: the new columns by descending Rayleigh quotient of the old ones, each in one
piece of memory, and ``order [..., d]``, the old column that each of them continues. A matrix that can't be followed
comes out as NaN. A solver never raises and never waits for an accelerator, and no matrix's result depends on the others
in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from steepest.linalg.attempts import at_hand, attempt, each, succeeded
from steepest.linalg.eigenbasis import conjugate, eigenvectors
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.surroundings import without_autocast
from steepest.linalg.untraced import untraced

Follow = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""The signature of a solver: ``(K, Q, iterations)`` to ``(Q, order)``."""

ALIGNED, CONFLICT = 16, 512
"""On a CPU, columns are kept apart by a multiple of the first number of entries, and by none of the second; see
`columns_apart`."""
LARGEST_TURN = 0.1
"""The limit to which entries of `first_order`'s rotation are clamped."""
TRUSTED = 0.1
"""A squared pivot from which one pass of Cholesky-QR leaves columns orthogonal to 1e-5 in float32. They are off by
about 5 eps / pivot², measured on drifting matrices of 64 to 512 rows."""
HOPELESS = 1e-5
"""A squared pivot below which a second pass can't be relied on."""


def choose(device: str) -> Literal["qr", "first_order"]:
    """The solver that "auto" stands for on a type of device.

    On a CPU it is "qr", at every size and frequency that were measured (benchmarks/refresh.py, docs/soap.md):
    Householder's reflections run nearly as fast there as products do, and "cholesky" comes out even at best. On
    accelerators it is "first_order", by counts of FLOPs: 9⅓ d³ of which all but 1⅓ are products, against 4⅔ d³ of which
    only 2 are. Reflections are applied one panel after the other, and batches of them in a loop. The meta device, on
    which FLOPs are counted, stands for a CPU.

    Example:
        >>> choose("cpu"), choose("cuda")
        ('qr', 'first_order')
    """
    return "qr" if device in ("cpu", "meta") else "first_order"


# "qr": orthogonal iteration with Householder's reflections.


def reflections(A: Tensor) -> Tensor:
    """The whole Q ``[..., m, m]`` of ``A [..., m, n]``, m at least n, by Householder's reflections.

    Each column lies in one piece. LAPACK's errors are raised.
    """
    m, n = A.shape[-2:]
    R, scales = torch.geqrf(columns_apart(A))
    if m > n:
        R = torch.cat([R, R.new_zeros(*R.shape[:-1], m - n)], dim=-1)
    Q: Tensor = torch.linalg.householder_product(R, scales)[..., :m, :]
    return Q.mT.contiguous().mT


householder = partial(attempt, reflections)
"""The Q of ``A [..., d, d]`` by Householder's reflections, without forming R; NaN where that fails.

It is backward stable whatever A is: where A has no full rank, some orthonormal columns complete the basis.
"""


def columns_apart(A: Tensor) -> Tensor:
    """Append rows of zeros to ``A [..., m, n]``, which reflect nothing, where a CPU is faster or more exact with them.

    Columns that begin a multiple of 512 entries apart meet in few lines of a CPU's caches. Kept apart they take 0.70 of
    the time at 1024 rows, 0.79 at 512 (benchmarks/padding.py). And where the matrices of a stack would not begin at
    multiples of 64 bytes, and be rounded otherwise than alone, they do with their columns filled up. (Taking them one
    by one, as `steepest.linalg.attempts.each` does, would have no place for R.)
    """
    m, n = A.shape[-2:]
    misaligned = m * n * A.itemsize % 64 != 0
    zeros = -m % ALIGNED if misaligned else ALIGNED * (m % CONFLICT == 0)
    if not zeros or A.device.type != "cpu":
        return A
    return torch.cat([A.mT, A.new_zeros(*A.shape[:-2], n, zeros)], dim=-1).mT  # columns lie contiguous


@without_autocast
def orthogonal_iteration(K: Tensor, Q: Tensor, power_iter_steps: int = 1) -> Tensor:
    """Refine an approximate eigenbasis by orthogonal iteration: ``Q ← qr(K Q)``, ``power_iter_steps`` times.

    The columns that come first converge first, and keep their places; `ordered_iteration` orders them beforehand.

    Args:
        K: symmetric positive semidefinite matrices ``[..., d, d]``.
        Q: their approximate eigenvectors ``[..., d, d]``, orthonormal columns.
        power_iter_steps: products and factorizations; more cost more and follow faster.

    Returns:
        ``[..., d, d]``; NaN for a matrix that can't be factorized.

    Example:
        >>> K = torch.diag(torch.tensor([4.0, 1.0]))
        >>> Q = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        >>> orthogonal_iteration(K, Q, power_iter_steps=4).abs()
        tensor([[1.0000, 0.0029],
                [0.0029, 1.0000]])
    """
    for _ in range(power_iter_steps):
        Q = householder(K @ Q)
    return Q


def ordered_iteration(
    K: Tensor, Q: Tensor, power_iter_steps: int = 1, orthonormalize: Callable[[Tensor], Tensor] = householder
) -> tuple[Tensor, Tensor]:
    """Order the columns by Rayleigh quotient and take a step of orthogonal iteration; one product ``K Q`` serves both.

    The order comes before the factorization, which gives the first columns the first choice.

    Args:
        K: as in `orthogonal_iteration`.
        Q: likewise.
        power_iter_steps: likewise.
        orthonormalize: makes columns ``[..., d, d]`` orthonormal; the first k go on spanning the same space, for all k.

    Returns:
        ``(Q [..., d, d], order [..., d])``: column i continues column ``order[i]`` of the old basis.

    Example:
        >>> Q, order = ordered_iteration(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))
        >>> order
        tensor([1, 0])
    """
    d = K.shape[-1]
    rows = Q.mT @ K  # (K Q)ᵀ, as K is symmetric: moving its rows is cheaper than moving columns
    order = (rows * Q.mT).sum(dim=-1).argsort(dim=-1, descending=True, stable=True)
    moved = torch.gather(rows, -2, order.unsqueeze(-1).expand(*order.shape, d))
    Q = orthonormalize(moved.mT)
    for _ in range(power_iter_steps - 1):
        Q = orthonormalize(K @ Q)
    return Q, order


@untraced
def householder_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """`householder`, and a matrix ``[..., d, d]`` whose upper triangle is R; its lower triangle has no meaning.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
        >>> Q, R = householder_qr(A)
        >>> torch.dist(Q @ R.triu(), A) < 1e-5
        tensor(True)
    """
    d = A.shape[-1]
    try:
        R, scales = torch.geqrf(columns_apart(A))
        Q = by_columns(torch.linalg.householder_product(R, scales)[..., :d, :])
        found = not at_hand(A) or bool(succeeded(Q).all())
    except RuntimeError:
        found = False
    if found:
        return Q, R[..., :d, :]
    Q = householder(A)  # matrix by matrix
    return Q, Q.mT @ A


# "cholesky", "first_order" and "eigh".


def cholesky(K: Tensor, Q: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Orthogonal iteration with `cholesky_qr` in place of Householder's reflections.

    The basis is that of `ordered_iteration` but for rounding and the signs of columns, which stay as they were. On
    accelerators a multiple of the identity, a little above the rounding of K Q, is added to K, so that directions in
    which K is zero keep their columns.

    Example:
        >>> Q, order = cholesky(torch.diag(torch.tensor([1.0, 2.0, 0.5])), torch.eye(3))
        >>> order
        tensor([1, 0, 2])
        >>> Q
        tensor([[0., 1., 0.],
                [1., 0., 0.],
                [0., 0., 1.]])
    """
    Q, order = ordered_iteration(lifted(K), Q, steps, cholesky_qr)
    return by_columns(Q), order


def lifted(K: Tensor) -> Tensor:
    """K with the multiple of the identity that `cholesky` adds on accelerators."""
    if at_hand(K):
        return K
    trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    limits = torch.finfo(K.dtype)
    return K + (16 * limits.eps * trace + limits.tiny) * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)


def first_order(K: Tensor, Q: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Correct a basis by first-order perturbation theory, with products and one well conditioned Cholesky-QR.

    In the old basis ``Qᵀ K Q = D + E`` is nearly diagonal. The antisymmetric X with ``X_ij = E_ij / (d_j - d_i)`` turns
    it into its eigenvectors up to terms in X², and ``Q (I + X)`` is orthonormalized by Cholesky-QR: its Gram matrix
    ``I - X²`` has no eigenvalue below 1. This also restores the orthogonality that Q may lack, at each refresh.

    Between two directions with nearly the same eigenvalue any rotation is as good, and the formula exaggerates. So
    entries are clamped to 0.1, which left less off the diagonal than 0.5 or Jacobi's angle (at most 1) did, and vanish
    where the gap is rounding.

    Example:
        >>> K = torch.tensor([[4.0, 0.1], [0.1, 1.0]])
        >>> Q, _ = first_order(K, torch.eye(2))
        >>> (Q.mT @ K @ Q)[0, 1].abs() < 1e-3
        tensor(True)
    """
    order = torch.arange(K.shape[-1], device=K.device).expand(K.shape[:-1])
    for _ in range(steps):
        rows = Q.mT @ K
        quotients = (rows * Q.mT).sum(dim=-1)
        now = quotients.argsort(dim=-1, descending=True, stable=True)
        d, order = quotients.gather(-1, now), order.gather(-1, now)
        rows = rows.gather(-2, now.unsqueeze(-1).expand_as(rows))
        Q = Q.gather(-1, now.unsqueeze(-2).expand_as(Q))
        Q = cholesky_qr(Q + Q @ first_order_rotation(rows @ Q, d), passes=1)
    return by_columns(Q), order


def first_order_rotation(E: Tensor, d: Tensor) -> Tensor:
    """The antisymmetric X of `first_order`, ``[..., d, d]``, from E off the diagonal and ``d [..., d]`` on it."""
    gaps = d.unsqueeze(-2) - d.unsqueeze(-1)  # d_j - d_i, at row i and column j
    rounding = torch.finfo(E.dtype).eps * d.amax(dim=-1)[..., None, None]
    X = (E * gaps / (gaps.square() + rounding.square() + torch.finfo(E.dtype).tiny)).triu(1)
    X = X.clamp(-LARGEST_TURN, LARGEST_TURN)
    return X - X.mT


def full(K: Tensor, Q: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Decompose K anew. The i-th eigenvector continues the column of Q with the i-th largest Rayleigh quotient."""
    order = conjugate(K, Q, diag=True).argsort(dim=-1, descending=True, stable=True)
    return by_columns(eigenvectors(K)), order


SOLVERS: dict[str, Follow] = {"qr": ordered_iteration, "cholesky": cholesky, "first_order": first_order, "eigh": full}


@untraced
def cholesky_qr(A: Tensor, passes: int = 3) -> Tensor:
    """Orthonormalize the columns of ``A [..., d, d]`` as ``A R⁻¹`` with ``RᵀR = AᵀA``.

    All of it is products but for one factorization. The condition number is squared on the way, so columns are first
    scaled to take their lengths out of it. The smallest pivot of R then tells how far a column is from the span of
    the columns before it. On a CPU, where it is small, the pass is repeated on its result, or Householder's reflections
    take over, matrix by matrix. On accelerators nothing is looked at: all passes are made, and in all but the last a
    multiple of the identity under the root keeps R from failing (Fukaya et al., arXiv:1809.11085). Products are
    computed in full float32, whatever the precision around, since less would not give orthogonal columns.

    Args:
        A: ``[..., d, d]``.
        passes: the number of passes on accelerators; one is enough if A is nearly orthogonal.

    Returns:
        ``[..., d, d]``, NaN for a matrix where that fails.
    """
    with fp32_matmul_precision("highest"):
        if at_hand(A):
            return each(_watched, A)
        flat = A.reshape(-1, *A.shape[-2:])
        for _ in range(0 if A.is_meta else passes - 1):  # FLOPs are counted as on a CPU
            flat, _ = _cholesky_pass(flat, shift=8 * A.shape[-1] * torch.finfo(A.dtype).eps)
        Q, pivot = _cholesky_pass(flat)
        return torch.where((pivot > 0)[:, None, None], Q, torch.nan).reshape(A.shape)


def _watched(A: Tensor) -> Tensor:
    """One pass of Cholesky-QR, and a second one or reflections for each matrix whose pivots ask for it."""
    flat = A.reshape(-1, *A.shape[-2:])
    Q, pivot = _cholesky_pass(flat)
    for i in [i for i, p in enumerate(pivot.tolist()) if not p >= TRUSTED]:
        one = slice(i, i + 1)
        again, second = _cholesky_pass(Q[one])
        good = pivot[i] >= HOPELESS and second >= TRUSTED
        Q[one] = again if good else householder(flat[one])
    return Q.reshape(A.shape)


def _cholesky_pass(A: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """One pass for ``A [b, d, d]``, and the smallest squared pivot ``[b]`` with columns of length 1; 0 if it fails."""
    A = A / torch.linalg.vector_norm(A, ord=torch.inf, dim=-2, keepdim=True)  # not the length, whose square may vanish
    C = A.mT @ A
    if shift:
        C = C + torch.diag_embed(shift * C.diagonal(dim1=-2, dim2=-1))
    R, info = torch.linalg.cholesky_ex(C, upper=True)
    pivots = R.diagonal(dim1=-2, dim2=-1).square() / C.diagonal(dim1=-2, dim2=-1)
    Q: Tensor = torch.linalg.solve_triangular(R, A, upper=True, left=False)
    return Q, torch.where(info == 0, pivots.amin(dim=-1), 0)


# Columns.


def by_columns(Q: Tensor) -> Tensor:
    """``Q [..., d, d]`` with each column in one piece of memory, as LAPACK lays it out.

    Products round differently where a factor lies differently in memory.

    >>> by_columns(torch.eye(2)).stride()
    (1, 2)
    """
    return Q.mT.contiguous().mT


def reordered(x: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """Reorder rows (dim -2) or columns (-1) of ``x [..., m, n]`` by ``[..., m]`` or ``[..., n]``; None changes nothing.

    >>> reordered(torch.tensor([[1.0, 2.0]]), torch.tensor([1, 0]), -1)
    tensor([[2., 1.]])
    """
    if order is None:
        return x
    if dim == -1:
        return x.gather(-1, order.unsqueeze(-2).expand_as(x))
    rows = torch.arange(0, order.numel(), x.shape[-2], device=x.device).view(*order.shape[:-1], 1) + order
    return x.reshape(-1, x.shape[-1]).index_select(0, rows.view(-1)).view(x.shape)  # rows in one piece each
