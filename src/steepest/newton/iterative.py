"""Damped Gauss-Newton directions by conjugate gradients, where the Jacobian is too large to form.

    (Jᵀ H J + μ I) d = ∂f/∂θ        μ = λ tr(Jᵀ H J) / M

J is the derivative of the M outputs, H the Hessian of the loss with respect to them: the identity for ½ ‖r‖². Where
λ is small, conjugate gradients need thousands of products for an exact solution and end before: see docs/pinns.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest.linalg.surroundings import without_autocast
from steepest.newton.conjugate_gradients import conjugate_gradients
from steepest.newton.nystrom import Nystrom
from steepest.newton.products import Jacobian, Product, join, output_hessian
from steepest.newton.residual import half_square


class Iterative:
    """The system of a loss that is convex in the outputs.

    Args:
        evaluate: returns the outputs ``[...]`` with M numbers, in the graph of the parameters, and the loss as a scalar
            in the graph of the outputs; None in its place stands for half the outputs' sum of squares.
        params: the parameters.
        start: the first iterate ``[P]``, or None.
        products: the largest number of products for a direction.
        rank: of the Nyström preconditioner.
        seed: of its random vectors.
    """

    def __init__(
        self,
        evaluate: Callable[[], tuple[Tensor, Tensor | None]],
        params: Sequence[Tensor],
        start: Tensor | None,
        *,
        products: int,
        rank: int,
        seed: int,
    ) -> None:
        self._evaluate, self._params, self._start, self._products = evaluate, params, start, products
        outputs, loss = self.renew()
        if loss is None:
            self.loss = half_square(outputs)
            self._gradient = self._J.transposed_times(outputs.detach())  # [P]
        else:
            self.loss = float(loss)
            self._gradient = join(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True), params)
        self.size = outputs.numel()
        self.finite = math.isfinite(self.loss) and bool(self._gradient.isfinite().all())
        self._moved = self._J.used() | (self._gradient != 0)
        """Which entries move: rounding in the preconditioner would move others, too."""
        if self.finite:
            self._sketch = Nystrom(self._product, self._gradient, rank, seed)
            self._scale = self._sketch.trace / self.size

    def renew(self) -> tuple[Tensor, Tensor | None]:
        """Evaluate once more where the weights are as at first again: autograd refuses graphs of weights that moved."""
        outputs, loss = self._evaluate()
        self._J = Jacobian(outputs, self._params)
        self._inner: Product | None = None if loss is None else output_hessian(loss, outputs)
        return outputs, loss

    @without_autocast
    def _product(self, v: Tensor) -> Tensor:
        u = self._J.times(v)
        return self._J.transposed_times(u if self._inner is None else self._inner(u))

    @without_autocast
    def solve(self, damping: float) -> tuple[Tensor, float] | None:
        """Return d ``[P]``, and its product with the gradient; None where it doesn't point downwards."""
        if not self._scale > 0.0:  # without curvature, in a loss that is not convex, the gradient is all there is
            return self._gradient, float(self._gradient.dot(self._gradient))
        mu = damping * self._scale
        for start in [None] if self._start is None else [self._start, None]:
            d = conjugate_gradients(
                lambda v: self._product(v) + mu * v,
                self._gradient,
                start=start,
                preconditioner=self._sketch.preconditioner(mu),
                products=self._products,
            ).x
            d = torch.where(self._moved, d, 0.0)
            slope = float(d.dot(self._gradient))
            if slope > 0:
                return d, slope
        return (d, slope) if slope == 0 else None
