"""Powers of symmetric positive semidefinite matrices, such as the inverse roots with which Shampoo whitens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from steepest.linalg.attempts import at_hand, attempt
from steepest.linalg.solvers import ALIGNED, CONFLICT

LANES = 16
"""A number of entries that fills whole vector registers on any processor."""


def matrix_power(K: Tensor, exponent: float, *, eps: float = 0.0, relative: bool = False) -> Tensor:
    """Return ``(K + damping I)^exponent`` for symmetric positive semidefinite ``K``, by eigendecomposition.

    Directions in which the damped matrix is zero get zero, as in a pseudo-inverse, since nothing is known of them. With
    ``eps=0`` these are the eigenvalues below the rounding of the largest one, and all of them if K is zero.

    Args:
        K: ``[..., d, d]``; negative eigenvalues are rounding errors and count as zero.
        exponent: any real number; -1/4 is Shampoo's for a matrix, -1/2 whitens.
        eps: the damping, >= 0.
        relative: whether ``eps`` is a fraction of each matrix's largest eigenvalue, which makes the power exactly
            homogeneous: ``(c K)^p = c^p K^p`` at any scale of the gradients. Otherwise it has the units of ``K``.

    Returns:
        ``[..., d, d]``, symmetric; NaN for a matrix that no solver can decompose.

    Example:
        >>> K = torch.diag(torch.tensor([16.0, 1.0, 0.0]))
        >>> matrix_power(K, -0.25).diagonal()
        tensor([0.5000, 1.0000, 0.0000])
        >>> matrix_power(K, -0.25, eps=1e-4).diagonal()
        tensor([ 0.5000,  1.0000, 10.0000])
    """

    def power(K: Tensor) -> Tensor:
        eigenvalues, Q = torch.linalg.eigh(K)  # [..., d], [..., d, d]
        P: Tensor = (Q * spectral_power(eigenvalues, exponent, eps=eps, relative=relative).unsqueeze(-2)) @ Q.mT
        return P

    return attempt(power, K)


def cholesky(K: Tensor) -> tuple[Tensor, Tensor]:
    """Factorize symmetric positive definite ``K [..., d, d]`` as ``L Lᵀ``, by Cholesky's method.

    On a CPU K's own memory holds L afterwards. `torch.linalg.cholesky_ex` by itself would copy a K that lies by rows to
    memory that lies by columns, which is slow.

    Args:
        K: contiguous; what it holds afterwards has no meaning.

    Returns:
        L, lower triangular, and for each matrix ``[...]`` an integer that is 0 where it is positive definite.

    Example:
        >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        (tensor([[2., 0.],
                [1., 1.]]), tensor(0, dtype=torch.int32))
    """
    if not at_hand(K):
        L, info = torch.linalg.cholesky_ex(K)
        return L, info
    columns = K.mT  # the same matrix, in the layout of LAPACK
    info = torch.empty(K.shape[:-2], dtype=torch.int32, device=K.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    return columns, info


def inverse(K: Tensor, damping: Tensor | float = 0.0) -> Tensor:
    """Return ``(K + damping I)⁻¹`` for symmetric positive definite ``K + damping I``, by Cholesky's factorization.

    Args:
        K: ``[b, d, d]``.
        damping: a number, or one per matrix ``[b, 1, 1]``.

    Returns:
        ``[b, d, d]``, symmetric to the last bit; NaN for a matrix that is not positive definite.

    Example:
        >>> inverse(torch.tensor([[[3.0]], [[-1.0]]]), damping=1.0).flatten()
        tensor([0.2500,    nan])
    """

    def solve(K: Tensor) -> Tensor:
        L, info = cholesky(K.clone())  # `attempt` may need K again
        L.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0).unsqueeze(-1), torch.nan)  # which spreads
        return torch.cholesky_inverse(L).mT  # the same matrix, by rows again

    d = K.shape[-1]
    # On a CPU, columns a multiple of 512 entries apart are slow (`steepest.linalg.solvers.columns_apart`), so K
    # gets further rows and columns of the identity.
    more = ALIGNED if at_hand(K) and d % CONFLICT == 0 else 0
    damped = pad(K, (0, more, 0, more))  # a copy in any case
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal[..., :d].add_(damping.squeeze(-1) if isinstance(damping, Tensor) else damping)
    diagonal[..., d:].fill_(1)
    return attempt(solve, damped)[..., :d, :d]


def spectral_power(eigenvalues: Tensor, exponent: float, *, eps: float = 0.0, relative: bool = False) -> Tensor:
    """Return the eigenvalues of `matrix_power`, ``(λ + damping)^exponent`` or zero, for λ ``[..., d]`` in any order.

    Example:
        >>> spectral_power(torch.tensor([4.0, 0.0]), -0.5)
        tensor([0.5000, 0.0000])
    """
    eigenvalues = eigenvalues.clamp(min=0)
    largest = eigenvalues.amax(dim=-1, keepdim=True)  # [..., 1]
    damped = eigenvalues + (eps * largest if relative else eps)
    rounding = eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps * largest if eps == 0 else 0.0
    # Powers round differently in whole vector registers and in partly filled ones, so a matrix would get other bits in
    # another stack. Padding fills registers, and in float64 such differences are below float32's rounding.
    d = damped.shape[-1]
    powers = pad(damped.double(), (0, -d % LANES), value=1.0).pow(exponent)[..., :d]
    return powers.to(damped.dtype).where(damped > rounding, 0.0)
