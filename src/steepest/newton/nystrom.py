"""The leading eigenvalues of a matrix that is known by its products, as a preconditioner for conjugate gradients.

    Y = A Ω,  Ω [P, l] orthonormal        A ≈ Y (Ωᵀ Y)⁻¹ Yᵀ = U diag(S) Uᵀ
    (A + μ I)⁻¹ ≈ U diag(1 / (S + μ)) Uᵀ + (I - U Uᵀ) / (S_l + μ)

Frangella, Tropp and Udell, "Randomized Nyström preconditioning", arXiv:2110.02820, Algorithms 2.1 and 5.1, with the
same l products for the whole step, whatever the damping. For physics-informed networks: arXiv:2505.11638.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg.surroundings import without_autocast
from steepest.newton.products import Product


class Nystrom:
    """A Nyström approximation ``A ≈ U diag(S) Uᵀ`` of a positive semidefinite matrix.

    Args:
        product: from ``v [P]`` to ``A v``.
        like: a vector ``[P]`` of the wanted dtype and device.
        rank: l, the number of products; at most P are made.
        seed: of the random Ω.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
        >>> sketch = Nystrom(lambda v: A @ v, torch.zeros(3), rank=3, seed=0)
        >>> sketch.S.round(decimals=4).tolist(), round(sketch.trace, 3)
        ([3.0, 2.0, 0.0], 5.0)
        >>> sketch.preconditioner(1.0)(torch.ones(3)).round(decimals=3)
        tensor([0.2500, 0.3330, 1.0000])
    """

    @without_autocast
    def __init__(self, product: Product, like: Tensor, rank: int, seed: int) -> None:
        P = len(like)
        rank = min(rank, P)
        generator = torch.Generator(like.device).manual_seed(seed)
        gaussian = torch.randn(P, rank, generator=generator, dtype=like.dtype, device=like.device)
        Omega = torch.linalg.qr(gaussian)[0]  # [P, l]
        Y = torch.stack([product(column) for column in Omega.T], 1)  # [P, l]
        self.trace = float((Omega * Y).sum()) * P / rank
        """tr A, of which this is an unbiased estimate."""
        shift = P**0.5 * torch.finfo(like.dtype).eps * float(torch.linalg.matrix_norm(Y))
        Y = Y + shift * Omega
        L, info = torch.linalg.cholesky_ex(Omega.mT @ Y)
        if int(info):  # A is zero, indefinite or not finite: there is nothing to precondition with
            self.U, self.S = like.new_zeros(P, 1), like.new_zeros(1)
            return
        B = torch.linalg.solve_triangular(L, Y.mT, upper=False).mT  # [P, l]
        self.U, S, _ = torch.linalg.svd(B, full_matrices=False)
        self.S = (S.square() - shift).clamp(min=0.0)  # [l], falling

    def preconditioner(self, mu: float) -> Product:
        """Return the product with ``(A + μ I)⁻¹``, approximately, times ``S_l + μ``."""
        weights = (self.S[-1] + mu) / (self.S + mu) - 1  # [l]
        return lambda v: v + self.U @ (weights * (self.U.mT @ v))
