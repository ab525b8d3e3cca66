"""Eigenvectors of symmetric positive semidefinite matrices ``K [..., d, d]``, found anew or followed as K drifts.

Everywhere eigenvalues descend, and column i of ``Q`` belongs to eigenvalue i.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as in `steepest.linalg.attempts`

from steepest.linalg import attempts
from steepest.linalg.attempts import attempt, succeeded

ALIGNED, CONFLICT = 16, 512
"""Entries from column to column, on a CPU, where they are made a multiple of the first and none of the second; see
`_reflected`."""

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def eigh_with_fallback(K: Tensor, force_double: bool = False, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors (columns) of symmetric ``K [..., d, d]``.

    LAPACK's and cuSOLVER's float32 solvers fail to converge on some nearly singular matrices; those are tried again in
    float64, and as a last resort in float64 on the CPU. No solver takes bfloat16 or float16; these go by float32.

    Args:
        K: symmetric matrices; only the lower triangles are read.
        force_double: compute in float64 at once. The result has K's dtype all the same.
        eps: added to the diagonal first, if given; the eigenvalues returned include it.

    Returns:
        ``(eigenvalues [..., d], eigenvectors [..., d, d])``, in K's dtype.

    Raises:
        torch.linalg.LinAlgError: if every solver fails, as they do on matrices with NaN or infinity.

    Example:
        >>> values, vectors = eigh_with_fallback(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        >>> values
        tensor([3., 2., 1.])
    """
    _check_square(K, "K")
    A = K.float() if K.dtype in (torch.bfloat16, torch.float16) else K
    if eps is not None:
        A = A + eps * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    try:
        values, vectors = torch.linalg.eigh(A.double() if force_double else A)
    except LinAlgError:
        try:
            values, vectors = torch.linalg.eigh(A.double())
        except LinAlgError:
            values, vectors = torch.linalg.eigh(A.double().cpu())
    return values.flip(-1).to(K), vectors.flip(-1).to(K)


def eigenvectors(K: Tensor, force_double: bool = False) -> Tensor:
    """`eigh_with_fallback`'s eigenvectors for use inside a step: NaN, not an exception, where every solver fails.

    Example:
        >>> eigenvectors(torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])).isnan().any(dim=(-2, -1))
        tensor([False,  True])
    """
    Q = attempt(lambda K: torch.linalg.eigh(K).eigenvectors, K.double() if force_double else K)
    return Q.flip(-1).to(K)


def orthogonal_iteration(K: Tensor, Q: Tensor, power_iter_steps: int = 1) -> Tensor:
    """One refinement of an approximate eigenbasis: ``Q ← qr(K Q)``, ``power_iter_steps`` times.

    Columns that come first converge first, and keep their places: `by_rayleigh_quotient` orders them beforehand.

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


def householder(A: Tensor) -> Tensor:
    """The Q of ``A [..., d, d]`` by Householder's reflections, without forming R; NaN where that fails.

    Backward stable whatever A is: where it has no full rank, some orthonormal columns complete the basis.
    """
    return attempt(lambda A: _reflected(A)[0], A)


@_disable_dynamo
def householder_qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """`householder`, and a matrix ``[..., d, d]`` whose upper triangle is R; what is below it means nothing.

    Example:
        >>> A = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
        >>> Q, R = householder_qr(A)
        >>> torch.dist(Q @ R.triu(), A) < 1e-5
        tensor(True)
    """
    try:
        Q, R = _reflected(A)
        found = not attempts.at_hand(A) or bool(succeeded(Q).all())
    except RuntimeError:
        found = False
    if found:
        return Q, R
    Q = householder(A)  # matrix by matrix
    return Q, Q.mT @ A


def _reflected(A: Tensor) -> tuple[Tensor, Tensor]:
    """`householder_qr`, or LAPACK's exception.

    On a CPU, columns that begin a multiple of 512 entries apart meet in few lines of its caches. Rows of zeros below
    keep them apart and reflect nothing: that takes 0.70 of the time at 1024 rows, 0.79 at 512 (benchmarks/padding.py).
    And where matrices of a stack would not begin at multiples of 64 bytes, and be rounded otherwise than alone, they do
    with their columns filled up. (`attempts.each` would take them one by one for that, and has no place for R.)
    """
    d = A.shape[-1]
    misaligned = d * d * A.itemsize % 64 != 0
    zeros = -d % ALIGNED if misaligned else ALIGNED * (d % CONFLICT == 0)
    if zeros and A.device.type == "cpu":
        A = torch.cat([A.mT, A.new_zeros(*A.shape[:-1], zeros)], dim=-1).mT  # columns lie contiguous
    R, scales = torch.geqrf(A)
    Q = torch.linalg.householder_product(R, scales)
    return by_columns(Q[..., :d, :]), R[..., :d, :]


def by_columns(Q: Tensor) -> Tensor:
    """``Q [..., d, d]`` with each column in one piece of memory, as LAPACK lays it out.

    Products round otherwise where a factor lies otherwise, and what another rank has sent lies by rows.

    >>> by_columns(torch.eye(2)).stride()
    (1, 2)
    """
    return Q.mT.contiguous().mT


def ordered_iteration(
    K: Tensor, Q: Tensor, power_iter_steps: int = 1, orthonormalize: Callable[[Tensor], Tensor] = householder
) -> tuple[Tensor, Tensor]:
    """`by_rayleigh_quotient`, then `orthogonal_iteration`; one product ``K Q`` serves both.

    Ordered before the factorization, which gives the first columns the first choice.

    Args:
        K: as in `orthogonal_iteration`.
        Q: likewise.
        power_iter_steps: likewise.
        orthonormalize: from ``[..., d, d]`` to orthonormal columns that span in turn the same spaces.

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


def conjugate(a: Tensor, p: Tensor, diag: bool = False) -> Tensor:
    """``pᵀ a p`` for matrices ``[..., d, d]``; with ``diag=True`` only its diagonal ``[..., d]``, at half the cost.

    With an eigenbasis for p, the diagonal holds the Rayleigh quotients: the best eigenvalues that this basis can give.

    Example:
        >>> conjugate(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2), diag=True)
        tensor([2., 2.])
    """
    ap = a @ p
    return (ap * p).sum(dim=-2) if diag else p.mT @ ap


def by_rayleigh_quotient(K: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """``Q``'s columns ordered by descending Rayleigh quotient under ``K``, and that order ``[..., d]``.

    Whatever else is indexed by eigenvector must follow the same order.

    Example:
        >>> Q, order = by_rayleigh_quotient(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))
        >>> order
        tensor([1, 0])
    """
    order = conjugate(K, Q, diag=True).argsort(dim=-1, descending=True, stable=True)
    return torch.gather(Q, -1, order.unsqueeze(-2).expand_as(Q)), order


def eigenbasis_error(K: Tensor, Q: Tensor | None) -> Tensor:
    """How far Q is from diagonalizing K: ``1 - ‖diag(Qᵀ K Q)‖₂ / ‖K‖_F`` in [0, 1], one number per matrix; 0 for K = 0.

    Without Q: how far K is from diagonal.

    Example:
        >>> eigenbasis_error(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))
        tensor(0.)
    """
    norm = torch.linalg.matrix_norm(K)
    quotients = K.diagonal(dim1=-2, dim2=-1) if Q is None else conjugate(K, Q, diag=True)
    kept = torch.linalg.vector_norm(quotients, dim=-1)
    return 1 - torch.where(norm > 0, kept / norm, 1)


def _check_square(K: Tensor, name: str) -> None:
    if not isinstance(K, Tensor):
        raise TypeError(f"{name} must be a tensor [..., d, d], not {type(K).__name__}")
    if K.dim() < 2 or K.shape[-1] != K.shape[-2]:
        raise ValueError(f"{name} must be square matrices [..., d, d], not of shape {list(K.shape)}")
