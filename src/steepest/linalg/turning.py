"""Refreshes of a basis whose matrix is kept in the basis' own coordinates.

Where ``Qᵀ K Q`` is kept in place of K, no solver has to multiply by Q. A refresh is a *turn*: an orthonormal U, close
to a permutation, which takes the coordinates of one basis to those of the next, ``Q ← Q U`` and ``K ← Uᵀ K U``. The
solvers are those of `steepest.linalg.solvers`, and one iteration gives the same result, up to rounding.

All products here are in full float32, whatever the precision around. K and Q are products of all turns that ever were,
so no later turn brings back what one of them has rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.solvers import by_columns, cholesky_qr, first_order_rotation, householder_qr, lifted, reordered
from steepest.linalg.symmetric import mirrored, triangle_product

TOLERATED = 40
"""The skew of a basis (`_skew`), in machine epsilons, from which it is made orthogonal anew: some 5e-6 in float32."""


class Turn(NamedTuple):
    """A change from the coordinates of one basis to those of the next."""

    U: Tensor
    """``[..., d, d]``, orthonormal; NaN where every solver failed."""
    order: Tensor | None
    """``[..., d]``: column i of U continues axis ``order[i]``; None: axis i."""
    K: Tensor
    """``Uᵀ K U``, symmetric to the last bit."""


def turn(K: Tensor, solver: str = "qr", steps: int = 1) -> Turn:
    """Compute the turn of one refresh, its columns by the descending diagonal of K as it was.

    Args:
        K: ``[..., d, d]``, symmetric positive semidefinite, in the coordinates of the basis.
        solver: "qr", "cholesky", "first_order" or "eigh"; see `steepest.linalg.solvers`.
        steps: iterations; "eigh" needs none.

    Example:
        >>> U, order, K = turn(torch.tensor([[1.0, 0.1], [0.1, 4.0]]))
        >>> order, K[0, 1].abs() < 0.1
        (tensor([1, 0]), tensor(True))
    """
    order = K.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    if solver == "eigh":
        U, _, K = decomposed(K)
        return Turn(by_columns(U), order, K)
    with fp32_matmul_precision("highest"):
        U, K = ITERATIONS[solver](K, order)
        in_order = torch.arange(K.shape[-1], device=K.device).expand_as(order)
        for _ in range(steps - 1):
            V, K = ITERATIONS[solver](K, in_order)
            U = U @ V
    return Turn(by_columns(U), order, K)


def decomposed(K: Tensor) -> Turn:
    """Compute the turn onto the eigenvectors of K by a full decomposition; its columns continue no particular axis."""
    return onto(eigenvectors(K), K)


def onto(U: Tensor, K: Tensor) -> Turn:
    """Return the turn onto an orthonormal ``U [..., d, d]``, whose columns continue no particular axis.

    >>> onto(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.diag(torch.tensor([1.0, 2.0]))).K
    tensor([[2., 0.],
            [0., 1.]])
    """
    with fp32_matmul_precision("highest"):
        return Turn(U, None, _conjugated(K, U))


def turned(Q: Tensor, U: Tensor, polish: bool = False) -> Tensor:
    """Return the turned basis ``Q U [..., d, d]``, orthonormal.

    Each product leaves its rounding in the basis. Columns are scaled to length 1, since errors in their lengths would
    add up. Angles between them err at random: entries of ``QᵀQ - I`` come to 1e-5 in some 2000 turns, in float32. On a
    CPU, which can look without waiting, the basis is then made orthogonal anew.

    Args:
        Q: orthonormal columns, up to rounding.
        U: likewise.
        polish: make it orthogonal anew in any case, for a Q that was kept in fewer digits.

    Example:
        >>> Q = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
        >>> turned(Q, Q.mT)
        tensor([[1., 0.],
                [0., 1.]])
    """
    with fp32_matmul_precision("highest"):
        rows = U.mT @ Q.mT  # the transpose, as bases' columns lie contiguous
        if polish:
            rows = _polished(rows)
        rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
        if attempts.at_hand(rows):
            flat = rows.view(-1, *rows.shape[-2:])
            for i, skew in enumerate(_skew(flat).tolist()):
                if skew > TOLERATED * torch.finfo(rows.dtype).eps:
                    flat[i] = _polished(flat[i])
    return rows.mT


def _polished(rows: Tensor) -> Tensor:
    """One Newton-Schulz step towards orthonormal rows, which squares their distance from orthonormality."""
    return 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows


def _skew(rows: Tensor) -> Tensor:
    """About three times the root mean square of ``Q Qᵀ - I`` for rows Q, ``[...]``, from its product with ones."""
    off = (rows * rows.sum(dim=-2, keepdim=True)).sum(dim=-1) - 1  # BLAS would round differently in other stacks
    return off.abs().amax(dim=-1) / math.sqrt(rows.shape[-1])


def _reflections(K: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal iteration from the identity, ``K Π = U R``; then ``Uᵀ K U = R Πᵀ U``, and half of R is zero."""
    U, R = householder_qr(reordered(K, order, -2).mT)  # (Πᵀ K)ᵀ, as K is symmetric
    return U, triangle_product(R, reordered(U.mT, order, -1).mT)


def _cholesky(K: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    U = cholesky_qr(reordered(lifted(K), order, -2).mT)
    return U, _conjugated(K, U)


def _first_order(K: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    K = reordered(reordered(K, order, -2), order, -1)
    X = first_order_rotation(K, K.diagonal(dim1=-2, dim2=-1))
    V = cholesky_qr(torch.eye(K.shape[-1], dtype=K.dtype, device=K.device) + X, passes=1)
    return reordered(V, order.argsort(dim=-1), -2), _conjugated(K, V)


ITERATIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "qr": _reflections,
    "cholesky": _cholesky,
    "first_order": _first_order,
}
"""From K and an order Π of its axes to U and ``Uᵀ K U``."""


def _conjugated(K: Tensor, U: Tensor) -> Tensor:
    return mirrored(U.mT @ K @ U)
