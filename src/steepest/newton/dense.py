"""Damped least squares with the whole Jacobian, by Cholesky's decomposition in the smaller of its two dimensions.

    primal    d = (Jᵀ J + μ I)⁻¹ Jᵀ r        [P, P]
    dual      d = Jᵀ (J Jᵀ + μ I)⁻¹ r        [R, R]

Both are the same direction. μ is the damping λ times ``‖J‖_F² / R``, the mean square of the Jacobian's rows, so that
λ depends neither on the number of points nor on the residuals' unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.symmetric import gram


class Dense:
    """Residuals ``r [R]`` at the weights, with their Jacobian ``J [R, P]``.

    Example:
        >>> system = Dense(torch.tensor([[2.0, 0.0]]), torch.tensor([6.0]))
        >>> system.loss, system.solve(0.5)  # 2 · 6 / (4 + 0.5 · 4), and its product with the gradient
        (18.0, (tensor([2., 0.]), 24.0))
    """

    def __init__(self, J: Tensor, r: Tensor) -> None:
        self.J, self.r = J, r
        self.dual = len(J) < J.shape[1]
        self.loss = float(r.dot(r)) / 2
        with fp32_matmul_precision("highest"):
            self.K = gram((J if self.dual else J.mT)[None])[0]  # [R, R] or [P, P]
        self.scale = float(self.K.trace()) / max(1, len(J))
        self.right = r if self.dual else J.mT @ r

    @property
    def finite(self) -> bool:
        """Whether a step can be computed: from one residual or derivative that is not finite none can."""
        return bool(torch.tensor(self.loss + self.scale).isfinite())

    def renew(self) -> None:
        """Do nothing: J does not change with the weights."""

    def solve(self, damping: float) -> tuple[Tensor, float] | None:
        """Return d ``[P]``, and its product with the gradient; None where the decomposition fails."""
        if not self.scale:  # J is zero, and so is the gradient
            return self.J.new_zeros(self.J.shape[1]), 0.0
        A = self.K.clone()
        A.diagonal().add_(damping * self.scale)
        L, info = torch.linalg.cholesky_ex(A)
        if int(info):
            return None
        y = torch.cholesky_solve(self.right[:, None], L)[:, 0]
        if not self.dual:
            return y, float(self.right.dot(y))
        d = self.J.mT @ y
        return d, float((self.J @ d).dot(self.r))
