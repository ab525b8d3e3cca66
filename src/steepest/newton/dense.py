"""Damped least squares with the whole Jacobian, by Cholesky's decomposition in the smaller of its two dimensions.

    primal    d = (Jᵀ J + μ I)⁻¹ Jᵀ r        [P, P]
    dual      d = Jᵀ (J Jᵀ + μ I)⁻¹ r        [R, R]

Both are the same direction. μ is the damping λ times ``‖J‖_F² / R``, the mean square of the Jacobian's rows, so that
λ depends neither on the number of points nor on the residuals' unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from steepest.linalg.roots import cholesky
from steepest.linalg.surroundings import without_autocast
from steepest.linalg.symmetric import gram
from steepest.newton.residual import half_square


class Dense:
    """Residuals ``r [R]`` at the weights, with their Jacobian ``J [R, P]``.

    It is solved in float64 for weights of float32, too, since K has the square of J's condition.

    Args:
        J: the Jacobian.
        r: the residuals.
        dual: which of the two forms is used; by default the one with the smaller matrix.

    Example:
        >>> system = Dense(torch.tensor([[1.0, 0.0]]), torch.tensor([6.0]))
        >>> system.solve(3.0)  # 6 / (1 + 3 · 1), and its product with the gradient
        (tensor([1.5000, 0.0000]), 9.0)
    """

    @without_autocast
    def __init__(self, J: Tensor, r: Tensor, dual: bool | None = None) -> None:
        self.dtype, self.J, self.r = J.dtype, J.double(), r.double()
        self.dual = len(J) < J.shape[1] if dual is None else dual
        self.K = gram((self.J if self.dual else self.J.mT)[None])[0]  # [R, R] or [P, P]
        self.scale = float(self.K.trace()) / len(J)
        self.right = self.r if self.dual else self.J.mT @ self.r
        self.loss = half_square(r)
        self.finite = math.isfinite(self.loss + self.scale)  # of K's trace, all derivatives are part

    def renew(self) -> None:
        """Do nothing: J does not change with the weights."""

    @without_autocast
    def solve(self, damping: float) -> tuple[Tensor, float] | None:
        """Return d ``[P]``, and its product with the gradient; None where the decomposition fails."""
        if not self.scale:  # J is zero, and so is the gradient
            return torch.zeros_like(self.J[0], dtype=self.dtype), 0.0
        A = self.K.clone()
        A.diagonal().add_(damping * self.scale)
        L, info = cholesky(A)
        if int(info):
            return None
        y = torch.linalg.solve_triangular(L, self.right[:, None], upper=False)  # in a sixth of cholesky_solve's time
        y = torch.linalg.solve_triangular(L.mT, y, upper=True)[:, 0]
        d = self.J.mT @ y if self.dual else y
        slope = self.r.dot(self.J @ d) if self.dual else self.right.dot(d)
        return d.to(self.dtype), float(slope)
