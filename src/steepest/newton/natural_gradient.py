"""The natural gradient with the exact Fisher matrix.

    d = (c F + λ I)⁻¹ g           F = Jᵀ F_o J, the mean over rows of the Fisher matrices of the model's likelihood
    s = min(1, √(κ / KL)) · lr    KL = ½ dᵀ F d, to second order the divergence in a row that d would make
    θ ← θ - t d                   t = s, s/2, s/4 ... s/2¹⁰, the first that lowers the loss

g is the gradient of the loss, which is c times the mean over rows of the negative log likelihood. Amari, "Natural
gradient works efficiently in learning", 1998; the bound on the divergence as in Schulman et al., arXiv:1502.05477.

With M = rows · C outputs, d comes from the smaller of two systems, or from conjugate gradients:

    primal   (c Jᵀ F_o J + λ I)⁻¹ g                                                  [P, P]
    dual     g = Jᵀ u + e:  Jᵀ S⁻¹ u + (e - Jᵀ S⁻¹ c F_o J e) / λ,  S = c F_o J Jᵀ + λ I   [M, M]
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.surroundings import without_autocast
from steepest.newton.closures import Closure, Evaluated, backtrack, check_precision, evaluate, likelihood_curvature
from steepest.newton.conjugate_gradients import conjugate_gradients
from steepest.newton.flat import FlatOptimizer
from steepest.newton.products import LIKELIHOODS, Jacobian, Likelihood, Product, gauss_newton, join, pull
from steepest.rule.options import integer, number

DENSE = 1024
"""The number M of outputs up to which "auto" forms J, by M backward passes."""


@final
class NaturalGradient(FlatOptimizer):
    """The natural gradient for small models of a likelihood: the step that the exact Fisher matrix prescribes.

    It is for models of up to some ten thousand parameters and for studies of the Fisher matrix itself, with all data or
    large batches. For larger networks take K-FAC, which is its approximation by layers. A step never raises the loss
    of the closure, which must compute the same function whenever a step calls it: no dropout, and one batch a step.

    Args:
        params: the model, its parameters, ``(name, tensor)`` pairs, or groups, all with the same options.
        likelihood: what the outputs ``[rows, ..., C]`` are: "categorical" (logits; the default), "normal" (means, unit
            variance) or "bernoulli" (logits of independent bits). A loss that belongs to another one is refused.
        lr: the length of a step, in natural gradients.
        damping: λ, in the unit of the Fisher matrix. Smaller ones are faster where all data are in each step.
        max_kl: κ, the divergence in nats per row that a step may make at a learning rate of 1; 0: no bound.
        loss_scale: c. By default it is read off the loss, which must then be a multiple of the likelihood's: 1 for a
            mean over rows, 1/C for a mean over all entries. Any other loss, such as a policy's, needs a number here.
        solver: "dense", "cg", or "auto" (default), which is dense for up to 1024 outputs, rows times C.
        tolerance: conjugate gradients end where the residual is so much smaller than the gradient.
        products: the largest number of their products in one step.

    Raises:
        ValueError: for options out of range, and for groups with different ones.

    The state holds counts of steps (``step``), and of those where the loss, its gradient or its direction was not
    finite (``skipped``), in which nothing moves.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> y = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = NaturalGradient(model, likelihood="bernoulli", damping=1e-4)
        >>> def closure():
        ...     logits = model(x)
        ...     return logits, torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        >>> for _ in range(10):
        ...     loss = optimizer.step(closure)
        >>> round(float(loss), 4)  # the least that logits on a straight line can have
        0.5869
    """

    checks: ClassVar = {
        "likelihood": (lambda x: x in LIKELIHOODS, f"one of {', '.join(map(repr, LIKELIHOODS))}"),
        "lr": (lambda x: number(_scalar(x)) and x >= 0, "a number >= 0"),
        "damping": (lambda x: number(x) and x > 0, "a number above 0"),
        "max_kl": (lambda x: number(x) and x >= 0, "a number >= 0"),
        "loss_scale": (lambda x: x is None or (number(x) and x > 0), "None or a number above 0"),
        "solver": (lambda x: x in ("auto", "dense", "cg"), "'auto', 'dense' or 'cg'"),
        "tolerance": (lambda x: number(x) and 0 < x < 1, "a number between 0 and 1"),
        "products": (lambda x: integer(x) and x >= 1, "an integer >= 1"),
    }

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        *,
        likelihood: Likelihood = "categorical",
        lr: float | Tensor = 1.0,
        damping: float = 1e-2,
        max_kl: float = 0.1,
        loss_scale: float | None = None,
        solver: str = "auto",
        tolerance: float = 1e-3,
        products: int = 250,
    ) -> None:
        options = {"likelihood": likelihood, "lr": lr, "damping": damping, "max_kl": max_kl, "loss_scale": loss_scale}
        super().__init__(params, options | {"solver": solver, "tolerance": tolerance, "products": products})

    def _check(self) -> None:
        super()._check()
        check_precision(self.trainable, "NaturalGradient")

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Make one step, which never raises the loss, and return the loss ``[]`` before it.

        Args:
            closure: returns ``(outputs, loss)``, in the graph, without calling backward().

        Raises:
            TypeError: without a closure, or for one that returns something else.
            ValueError: for outputs or a loss that don't fit the likelihood. Nothing has changed then.
        """
        self._check()
        found = evaluate(closure, "NaturalGradient", outputs=True)
        d, slope, kl = self._direction(found)
        loss, entries, length = found.loss.detach(), self._memory(), float(self.options["lr"])
        del found  # and with it the graph
        entries["step"] += 1
        if not (bool(d.isfinite().all()) and math.isfinite(kl) and math.isfinite(float(loss))):
            entries["skipped"] += 1
            return loss
        bound = self.options["max_kl"]
        if bound and kl > bound:
            length *= math.sqrt(bound / kl)
        eps = torch.finfo(d.dtype).eps
        if length * slope <= eps * abs(float(loss)):  # what is left to gain is below rounding
            return loss
        with self._restoring() as before:

            def trial(length: float) -> float:
                self._move_to(before - length * d)
                return float(evaluate(closure, "NaturalGradient", outputs=True).loss.detach())

            if not backtrack(trial, float(loss), length)[0]:
                self._move_to(before)
        return loss

    def _layout(self, length: int) -> dict[str, tuple[int, ...]]:
        return {"step": (), "skipped": ()}

    @without_autocast
    def _direction(self, found: Evaluated) -> tuple[Tensor, float, float]:
        """Return d ``[P]``, gᵀ d, and ½ dᵀ F d."""
        options, (loss, outputs) = self.options, found
        assert outputs is not None
        J = Jacobian(outputs, self.trainable)
        inner, scale = likelihood_curvature(outputs, loss, options["likelihood"], options["loss_scale"])
        gradient = join(pull(loss, self.trainable, what="loss"), self.trainable)
        if not bool(gradient.isfinite().all()):
            return gradient, math.nan, math.nan
        if options["solver"] == "dense" or (options["solver"] == "auto" and outputs.numel() <= DENSE):
            (u,) = pull(loss, [outputs], what="loss")
            assert u is not None
            d = dense(J, lambda x: scale * inner(x), gradient, u, options["damping"])
        else:
            fisher, damping = gauss_newton(J, inner), options["damping"]
            bounds = {"residual": options["tolerance"], "products": options["products"], "progress": 0.0}
            d = conjugate_gradients(lambda v: scale * fisher(v) + damping * v, gradient, **bounds).x
        pushed = J.times(d)
        return d, float(gradient.dot(d)), 0.5 * float((pushed * inner(pushed)).sum())


def dense(J: Jacobian, inner: Product, gradient: Tensor, u: Tensor, damping: float) -> Tensor:
    """Return ``(Jᵀ H J + λ I)⁻¹ g [P]`` by the smaller of two systems; NaN where it can't be solved.

    Args:
        J: ``[M, P]``.
        inner: the product of H, which takes batches of vectors.
        gradient: g ``[P]``.
        u: the loss' gradient in the outputs, of their shape; ``g - Jᵀ u`` is what the loss has beside, as a penalty.
        damping: λ.
    """
    A = J.dense()  # [M, P]
    M, P = A.shape
    eye = torch.eye(min(M, P), dtype=A.dtype, device=A.device)
    with fp32_matmul_precision("highest"):
        if P <= M:
            HA = inner(A.mT.reshape(P, *u.shape)).reshape(P, M)  # [P, M]
            d: Tensor = torch.linalg.solve_ex(HA @ A + damping * eye, gradient)[0]
            return d
        beside = gradient - J.transposed_times(u)
        if float(beside.norm()) <= 100 * torch.finfo(A.dtype).eps * float(gradient.norm()):
            beside = torch.zeros_like(beside)
        K = A @ A.mT  # [M, M]
        HK = inner(K.reshape(M, *u.shape)).reshape(M, M).mT
        right = torch.stack([u.reshape(-1), inner((A @ beside).view_as(u)).reshape(-1)], 1)  # [M, 2]
        x: Tensor = torch.linalg.solve_ex(HK + damping * eye, right)[0]
        return A.mT @ x[:, 0] + (beside - A.mT @ x[:, 1]) / damping


def _scalar(x: Any) -> Any:
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
