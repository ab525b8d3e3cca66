"""Orthonormal bases of the columns of tall matrices ``[..., m, r]``, NaN for a matrix that cannot be factorized."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.linalg.attempts import attempt

OVERSAMPLING = 1.25
"""The number of rows of the sketch per column of the matrix."""
EXTRA_ROWS = 8
"""A number of rows to add to the sketch, since a sketch of few columns would be unreliable without them."""


def qr(A: Tensor) -> Tensor:
    """Return the Q of Householder's QR, which is backward stable, and slow for batches on GPUs.

    Columns beyond the rank of A are arbitrary.
    """
    return attempt(_qr, A)


def rcqr(A: Tensor) -> Tensor:
    """Return the Q of randomized Cholesky-QR: products, triangular solves and the QR of a small sketch.

    Cholesky-QR squares the condition number. So the triangular factor of a sketch ``S A`` first makes the columns
    nearly orthonormal (Fan et al., arXiv:2111.11148; Ahn et al., arXiv:2504.05295). S is Gaussian and always the same
    for a shape. Columns that depend linearly on earlier ones become zero.

    Example:
        >>> P = rcqr(torch.arange(80.0).reshape(40, 2).sin())
        >>> torch.dist(P.mT @ P, torch.eye(2)) < 1e-6
        tensor(True)
    """
    return attempt(_rcqr, A)


def _qr(A: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(A).Q
    return Q


def _rcqr(A: Tensor) -> Tensor:
    m, r = A.shape[-2:]
    k = math.ceil(OVERSAMPLING * r) + EXTRA_ROWS
    if k >= m:
        return _qr(A)
    R = torch.linalg.qr(gaussian(k, m, A) @ A, mode="r").R  # [..., r, r]
    pivots = R.diagonal(dim1=-2, dim2=-1).abs()  # [..., r], the distance of a column from the span of the earlier ones
    dependent = pivots <= m * torch.finfo(A.dtype).eps * torch.linalg.vector_norm(R, dim=-2)
    one = torch.diag_embed(dependent.to(A.dtype))  # [..., r, r], a one in both factors for each dependent column
    P: Tensor = torch.linalg.solve_triangular(torch.where(dependent.unsqueeze(-1), one, R), A, upper=True, left=False)
    P = P.masked_fill(dependent.unsqueeze(-2), 0)  # [..., m, r], nearly orthonormal
    C, info = torch.linalg.cholesky_ex(P.mT @ P + one, upper=True)
    P = torch.linalg.solve_triangular(C, P, upper=True, left=False)
    return torch.where(info.unsqueeze(-1).unsqueeze(-1) == 0, P, torch.nan)


def gaussian(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return the same normal random numbers ``[rows, columns]`` on every call, without the global random state."""
    if like.is_meta:
        return like.new_empty(rows, columns)
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=like.device)


ORTHONORMALIZERS = {"qr": qr, "rcqr": rcqr}
