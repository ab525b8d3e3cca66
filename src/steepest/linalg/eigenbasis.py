"""Eigenvectors of symmetric positive semidefinite matrices ``K [..., d, d]``, and how well a basis diagonalizes them.

Eigenvalues descend everywhere, and column i of ``Q`` belongs to eigenvalue i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg.attempts import at_hand, attempt, one_by_one
from steepest.linalg.orthonormal import gaussian
from steepest.linalg.surroundings import without_autocast

THIN = 4
"""The number of times that a rank must go into the number of rows for `eigenvectors` to make use of it."""
EXTRA = 8
"""A number of columns beyond the rank in the sketch of a matrix of low rank."""

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


@without_autocast
def eigh_with_fallback(K: Tensor, force_double: bool = False, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues (descending) and eigenvectors (columns) of symmetric ``K [..., d, d]``.

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


def eigenvectors(K: Tensor, force_double: bool = False, rank: int | None = None) -> Tensor:
    """Compute eigenvectors as `eigh_with_fallback` does, but give NaN, not an exception, where every solver fails.

    Args:
        K: symmetric matrices ``[..., d, d]``.
        force_double: compute in float64.
        rank: what K's rank probably is. On a CPU, where it is at most a quarter of d, it saves most of the time. A
            matrix of higher rank is found out, and decomposed in full.

    Example:
        >>> eigenvectors(torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)])).isnan().any(dim=(-2, -1))
        tensor([False,  True])
    """
    if rank is None or not is_thin(K, rank):
        return attempt(_full, K.double() if force_double else K).to(K)
    limit = 32 * torch.finfo(K.dtype).eps
    return attempt(lambda K: one_by_one(lambda one: _of_low_rank(one, rank, limit), K), K.double()).to(K)


def is_thin(K: Tensor, rank: int) -> bool:
    """Whether `eigenvectors` makes use of this rank of ``K [..., d, d]``."""
    return at_hand(K) and THIN * rank <= K.shape[-1]


def _full(K: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.eigh(K).eigenvectors
    return Q.flip(-1)


def _of_low_rank(K: Tensor, rank: int, limit: float) -> Tensor:
    """The eigenvectors of one matrix ``[1, d, d]``, from a sketch of its columns that a QR completes to a basis.

    Those of the null space are arbitrary, but move little if K does. More than the fraction ``limit`` of the trace
    outside of the sketch is more than K's rounding, and then the matrix is decomposed in full.
    """
    d, s = K.shape[-1], min(rank + EXTRA, K.shape[-1])
    trace = K.diagonal(dim1=-2, dim2=-1).sum()
    scaled = K / trace if trace > 0 else K  # numbers whose products neither overflow nor vanish
    sketch = torch.linalg.qr(scaled @ gaussian(d, s, K)).Q  # [1, d, s]
    reflectors, scales = torch.geqrf(scaled @ sketch)  # again, which leaves less of K's rounding in the sketch
    zeros = K.new_zeros(1, d, d - s)
    Q: Tensor = torch.linalg.householder_product(torch.cat([reflectors, zeros], dim=-1), scales)
    front = Q[..., :s]
    C = front.mT @ scaled @ front  # [1, s, s]
    if scaled.diagonal(dim1=-2, dim2=-1).sum() - C.diagonal(dim1=-2, dim2=-1).sum() > limit:
        return _full(K)
    Q[..., :s] = front @ _full(C)
    return Q


@without_autocast
def conjugate(a: Tensor, p: Tensor, diag: bool = False) -> Tensor:
    """``pᵀ a p`` for matrices ``[..., d, d]``; with ``diag=True`` only its diagonal ``[..., d]``, at half the cost.

    With an eigenbasis for p, the diagonal holds the Rayleigh quotients: the best eigenvalues that this basis can give.

    Example:
        >>> conjugate(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2), diag=True)
        tensor([2., 2.])
    """
    ap = a @ p
    return (ap * p).sum(dim=-2) if diag else p.mT @ ap


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
