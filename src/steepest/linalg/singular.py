"""The eigenvectors of ``G Gᵀ`` and ``Gᵀ G`` together, from G: the first bases of a matrix, after one gradient.

The singular vectors of G take one decomposition, on its shorter side, and no rounding of two covariances: the bases fit
each other, so that ``Uᵀ G V`` is diagonal up to the rounding of U and V themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg.attempts import attempt, one_by_one
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.orthonormal import gaussian
from steepest.linalg.solvers import reflections
from steepest.linalg.surroundings import without_autocast
from steepest.linalg.symmetric import gram
from steepest.linalg.untraced import untraced

PROPORTIONAL = 1e-3
"""The relative difference of two products with one vector up to which their matrices count as multiples of each other.
Products in full float32 differ by 1e-6, those in TF32 by some 1e-4."""


@untraced
@without_autocast
def shared_eigenvectors(G: Tensor, L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the eigenvectors of L and of R, which are multiples of ``G Gᵀ`` and ``Gᵀ G``, by descending eigenvalue.

    Where one of them isn't such a multiple, because somebody has written to it, say, both are decomposed in full. The
    host must know, and so would wait for an accelerator.

    Args:
        G: ``[b, m, n]``, float32 or float64.
        L: ``[b, m, m]``, symmetric positive semidefinite.
        R: ``[b, n, n]``, likewise.

    Returns:
        ``(Q_L [b, m, m], Q_R [b, n, n])``, computed in float64, in G's dtype; NaN where that fails.

    Example:
        >>> G = torch.tensor([[[0.0, 3.0], [1.0, 0.0], [0.0, 0.0]]])
        >>> Q_L, Q_R = shared_eigenvectors(G, G @ G.mT, G.mT @ G)
        >>> (Q_L.mT @ G @ Q_R).abs().round(decimals=4)
        tensor([[[3., 0.],
                 [0., 1.],
                 [0., 0.]]])
    """
    Q_L, Q_R = singular_vectors(G)
    if not G.is_meta:
        others = ~(_is_multiple(L, G) & _is_multiple(R, G.mT))  # [b]
        if bool(others.any()):
            Q_L[others], Q_R[others] = eigenvectors(L[others], True), eigenvectors(R[others], True)
    return Q_L, Q_R


def singular_vectors(G: Tensor) -> tuple[Tensor, Tensor]:
    """Compute orthogonal ``U [b, m, m]`` and ``V [b, n, n]`` that make ``Uᵀ G V`` diagonal, by descending entries.

    V comes from ``Gᵀ G`` in float64 if n is the shorter side, and ``G V`` has orthogonal columns, in the directions of
    U. They are scaled to length 1; those that are G's rounding become zero. Householder's reflections then complete
    them to a basis, whose further columns move little if G does, and are none the worse for float32.

    Example:
        >>> U, V = singular_vectors(torch.tensor([[[0.0, 2.0]]]))
        >>> U.abs(), V.abs()
        (tensor([[[1.]]]), tensor([[[0., 1.],
                 [1., 0.]]]))
    """
    m, n = G.shape[-2:]
    if m < n:
        V, U = singular_vectors(G.mT)
        return U, V
    A = G.double()
    V = eigenvectors(gram(A.mT))  # [b, n, n]
    A = A @ V
    lengths = torch.linalg.vector_norm(A, dim=-2, keepdim=True)  # [b, 1, n], the singular values
    rounding = torch.finfo(G.dtype).eps * lengths.amax(dim=-1, keepdim=True)
    A = torch.where(lengths <= rounding, 0, A / lengths).to(G.dtype)
    square = torch.nn.functional.pad(A, (0, m - n))  # [b, m, m], as `attempt` wants it
    U = attempt(lambda square: one_by_one(lambda one: reflections(one[..., :n]), square), square)
    return U, V.to(G.dtype)


def _is_multiple(K: Tensor, X: Tensor) -> Tensor:
    """Whether each of ``K [b, d, d]`` is a multiple of ``X Xᵀ``, by their products with a vector, ``[b]``."""
    x = gaussian(K.shape[-1], 1, K)
    found, expected = (torch.nn.functional.normalize(y, dim=-2, eps=0.0) for y in (K @ x, X @ (X.mT @ x)))
    zero = (K == 0).all(dim=-1).all(dim=-1) & (X == 0).all(dim=-1).all(dim=-1)
    near: Tensor = torch.linalg.vector_norm(found - expected, dim=(-2, -1)) <= PROPORTIONAL
    return zero | near
