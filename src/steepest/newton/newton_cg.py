"""Newton's method by conjugate gradients in a trust region.

    q(d) = gᵀ d + ½ dᵀ C d      g = ∇f(θ), C: the Hessian, the Gauss-Newton or the Fisher matrix
    d ≈ argmin q(d), ‖d‖ ≤ Δ    Steihaug's truncated conjugate gradients, which follow negative curvature to the edge
    θ ← θ + t d                 t = 1, ½, ¼ ... 2⁻¹⁰, the first that lowers f

Δ becomes t ‖d‖ where t < 1, and ‖d‖/4 where f fell by less than a quarter of what q promised. It is doubled where f
fell by more than three quarters of that and d ends at the edge. Steihaug (1983); Nocedal and Wright, "Numerical
Optimization", algorithms 4.1 and 7.2; Martens, "Deep learning via Hessian-free optimization", ICML 2010.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from steepest.newton.closures import (
    HALVINGS,
    Closure,
    Evaluated,
    backtrack,
    check_precision,
    evaluate,
    likelihood_curvature,
)
from steepest.newton.conjugate_gradients import Solution, truncated
from steepest.newton.flat import FlatOptimizer
from steepest.newton.products import (
    LIKELIHOODS,
    Jacobian,
    Likelihood,
    Product,
    check_likelihood,
    gauss_newton,
    hessian,
    join,
    output_hessian,
    pull,
)
from steepest.rule.options import integer, number

CURVATURES = ("hessian", "ggn", "fisher")


@final
class NewtonCG(FlatOptimizer):
    """Newton's method for smooth losses of all data or large batches; it has no learning rate.

    A step solves for a direction by products of the curvature with vectors, each of which costs about a gradient,
    and never raises the loss of the closure. It needs no matrix, and the memory of about ten vectors of all parameters
    besides the graph. The closure must compute the same function whenever a step calls it: no dropout, and one batch
    for each step.

    Args:
        params: the model, its parameters, ``(name, tensor)`` pairs, or groups, all with the same options.
        curvature: "hessian" (default), which may be indefinite: directions of negative curvature are followed;
            the closure returns the loss. "ggn", the Gauss-Newton matrix ``Jᵀ H_L J`` of a loss that is convex in the
            model's outputs; the closure returns ``(outputs, loss)``. On neural networks it needs fewer products.
            "fisher", the same with the Fisher matrix of a ``likelihood`` in the place of H_L.
        likelihood: "categorical" (logits), "normal" (mean, unit variance) or "bernoulli" (logits); for "fisher" only.
        loss_scale: the factor c between the loss and the mean over rows of the negative log likelihood; for "fisher"
            only. By default it is read off the loss, which must then be such a multiple.
        radius: of the trust region at the first step, in units of the parameters; later ones follow from the steps.
        tolerance: conjugate gradients end where the residual is so much smaller than the gradient.
        progress: they also end by Martens' test of relative progress; this is its ε.
        products: the largest number of products in one step.

    Raises:
        ValueError: for options out of range, and for groups with different ones.

    The state is ``radius``, and counts of steps (``step``) and of those where the loss or its gradient was not finite
    (``skipped``), in which nothing moves.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> optimizer = NewtonCG([x])
        >>> for _ in range(30):
        ...     loss = optimizer.step(lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)
        >>> x.detach().round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """

    checks: ClassVar = {
        "curvature": (lambda x: x in CURVATURES, "'hessian', 'ggn' or 'fisher'"),
        "likelihood": (lambda x: x is None or x in LIKELIHOODS, f"one of {', '.join(map(repr, LIKELIHOODS))}"),
        "loss_scale": (lambda x: x is None or (number(x) and x > 0), "None or a number above 0"),
        "radius": (lambda x: number(x) and x > 0, "a number above 0"),
        "tolerance": (lambda x: number(x) and 0 <= x < 1, "a number in [0, 1)"),
        "progress": (lambda x: number(x) and x >= 0, "a number >= 0"),
        "products": (lambda x: integer(x) and x >= 1, "an integer >= 1"),
    }

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        *,
        curvature: str = "hessian",
        likelihood: Likelihood | None = None,
        loss_scale: float | None = None,
        radius: float = 1.0,
        tolerance: float = 0.1,
        progress: float = 5e-4,
        products: int = 250,
    ) -> None:
        options = {"curvature": curvature, "likelihood": likelihood, "loss_scale": loss_scale, "radius": radius}
        super().__init__(params, options | {"tolerance": tolerance, "progress": progress, "products": products})

    def _check(self) -> None:
        super()._check()
        check_precision(self.trainable, "NewtonCG")
        options = self.options
        if options["curvature"] == "fisher":
            check_likelihood(options["likelihood"])  # None is not enough here
        for option in ("likelihood", "loss_scale"):
            if options["curvature"] != "fisher" and options[option] is not None:
                raise ValueError(
                    f"{option}={options[option]!r} with curvature={options['curvature']!r}: is for curvature='fisher'"
                )

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Make one step, which never raises the loss, and return the loss ``[]`` before it.

        Args:
            closure: returns the loss, or ``(outputs, loss)``, in the graph, without calling backward().

        Raises:
            TypeError: without a closure, or for one that returns something else.
            ValueError: for a loss without a graph or of other parameters. Nothing has changed then.
        """
        self._check()
        found = evaluate(closure, "NewtonCG", outputs=self.options["curvature"] != "hessian")
        gradient, product = self._curvature(found)
        start, entries = found.loss.detach(), self._memory()
        loss = float(start)
        entries["step"] += 1
        if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
            entries["skipped"] += 1
            return start
        bounds = {name: self.options[name] for name in ("tolerance", "progress", "products")}
        with self._restoring() as before:
            radius = float(entries["radius"])
            solution = truncated(product, -gradient, radius, residual=bounds.pop("tolerance"), **bounds)
            del found, product  # and with them the graph
            entries["radius"].fill_(self._move(solution, before, loss, radius, closure))
        return start

    def _layout(self, length: int) -> dict[str, tuple[int, ...]]:
        return {"step": (), "skipped": (), "radius": ()}

    def _begin(self) -> dict[str, float]:
        return {"radius": self.options["radius"]}

    def _curvature(self, found: Evaluated) -> tuple[Tensor, Product]:
        """Return the gradient ``[P]``, and the product of the curvature with vectors ``[P]``."""
        options, params, (loss, outputs) = self.options, self.trainable, found
        if options["curvature"] == "hessian":
            return hessian(loss, params)
        assert outputs is not None
        gradient = join(pull(loss, params, what="loss"), params)
        if options["curvature"] == "ggn":
            return gradient, gauss_newton(Jacobian(outputs, params), output_hessian(loss, outputs))
        inner, scale = likelihood_curvature(outputs, loss, options["likelihood"], options["loss_scale"])
        return gradient, gauss_newton(Jacobian(outputs, params), lambda u: scale * inner(u))

    def _move(self, solution: Solution, before: Tensor, loss: float, radius: float, closure: Closure | None) -> float:
        """Move along the direction as far as the loss falls, and return the next radius."""
        d, eps = solution.x, torch.finfo(before.dtype).eps
        if -solution.value <= eps * abs(loss):  # what is left to gain is below rounding
            return radius if solution.ended != "nonfinite" else radius / 4

        def trial(length: float) -> float:
            self._move_to(before + length * d)
            return float(evaluate(closure, "NewtonCG", outputs=self.options["curvature"] != "hessian").loss.detach())

        length, now = backtrack(trial, loss)
        norm, ratio = float(d.norm()), (now - loss) / solution.value
        if not length:
            self._move_to(before)
            return max(norm * 0.5**HALVINGS, eps)
        if length < 1.0 or ratio < 0.25:
            return max(norm * (length if length < 1.0 else 0.25), eps)
        return 2 * radius if ratio > 0.75 and solution.ended in {"boundary", "curvature"} else radius
