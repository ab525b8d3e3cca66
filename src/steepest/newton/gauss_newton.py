"""Gauss-Newton for least squares, with Levenberg's damping and backtracking.

    minimize f(θ) = ½ ‖r(θ)‖²        J = ∂r/∂θ   [R, P]
    d = (Jᵀ J + λ s I)⁻¹ Jᵀ r        s = ‖J‖_F² / R
    θ ← θ - t d                      t = 1, ½, ¼ ... 2⁻⁷, as long as f goes on falling

λ falls to a tenth after a step of t ≥ ¼, and grows tenfold after one of t < 0.03, and whenever no t lowers f. Levenberg
(1944) added the damping; that λ follows the accepted length, and not the ratio of actual to predicted reduction, was
measured (docs/pinns.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from steepest.newton.dense import Dense
from steepest.newton.flat import FlatOptimizer, falls
from steepest.newton.residual import Residual, Rows

LENGTHS = [0.5**k for k in range(8)]
"""The step lengths that are tried."""
HIGHEST = 1e10
"""Where no step lowers the loss with this damping, none will."""
SIDE, ENTRIES = 8192, 2**28
"""The largest matrix that "auto" decomposes, and the largest Jacobian that it forms: 0.5 and 2 GiB in float64."""


class System(Protocol):
    """The linear system of one step."""

    loss: float

    @property
    def finite(self) -> bool:
        """Whether a step can be computed."""

    def solve(self, damping: float) -> tuple[Tensor, float] | None:
        """Return d ``[P]``, and its product with the gradient; None where that fails."""


class GaussNewton(FlatOptimizer):
    """Gauss-Newton for least squares of up to some thousand parameters or residuals; it has no learning rate.

    It is for physics-informed networks, curve fitting and small models of physics, with all points in each step or
    large batches, and not for language models. Weights and points should be float64: float32 ends at relative errors
    of about 1e-5.

    Args:
        model: the network that residuals are evaluated with.
        params: the parameters to move, or groups of them; by default all that require a gradient.
        damping: λ of the first step. Later ones follow from the lengths of the steps.
        solver: "dense" forms the Jacobian and decomposes; "auto" does so while min(P, R) ≤ 8192 and P · R ≤ 2²⁸.

    Raises:
        ValueError: for options out of range, for parameters that the model doesn't have, and where it has none.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> x = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None]
        >>> fit = steepest.Residual(lambda u, x, y: u(x) - y, x, x.sin())
        >>> optimizer = steepest.GaussNewton(model)
        >>> for _ in range(50):
        ...     loss = optimizer.step([fit])
        >>> bool((model(x) - x.sin()).abs().max() < 1e-3)
        True
    """

    checks: ClassVar = {
        "damping": (lambda x: isinstance(x, float | int) and 0 < x < math.inf, "a number above 0"),
        "solver": (lambda x: x in ("auto", "dense", "cg"), "'auto', 'dense' or 'cg'"),
    }
    copied: ClassVar = ("model",)

    def __init__(
        self, model: nn.Module, params: Iterable[Any] | None = None, *, damping: float = 1e-3, solver: str = "auto"
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"GaussNewton({type(model).__name__}): the first argument is the model, an nn.Module")
        self.model = model
        moved = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
        if not moved:
            raise ValueError("GaussNewton needs parameters that require a gradient; the model has none")
        super().__init__(moved, {"damping": damping, "solver": solver})
        self._named()
        if self.param_groups[0]["params"][0].dtype == torch.float32:
            warnings.warn(
                "GaussNewton on float32 parameters: below relative errors of about 1e-5 it needs float64, as "
                "model.double() and points of float64",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """Make one step, which never raises the loss, and return the loss ``[]`` before it.

        Args:
            closure: one or several `Residual`s, whose losses are added.

        Where the loss or its Jacobian is not finite at the weights, nothing changes; `skipped` counts that.

        Raises:
            TypeError: without residuals.
            ValueError: where the residuals do not fit the solver. Nothing has changed then.
        """
        self._check()
        residuals = _residuals(closure)
        system = self._dense(residuals)
        entries = self._entries()
        if not entries:
            p = self.trainable[0]
            entries |= {"step": p.new_zeros(()), "skipped": p.new_zeros(())}
            entries |= {"damping": p.new_full((), self.options["damping"])}
        entries["step"] += 1
        if not system.finite:
            entries["skipped"] += 1
            return self.trainable[0].new_tensor(system.loss)

        def loss() -> float:
            return sum(float(residual.loss(self.model)) for residual in residuals)

        with self._restoring() as before:
            entries["damping"].fill_(self._descend(system, float(entries["damping"]), before, loss))
        return before.new_tensor(system.loss)

    def _descend(self, system: System, damping: float, before: Tensor, loss: Callable[[], float]) -> float:
        """Move to the best of the weights that are tried, and return the next damping."""
        start, eps = damping, torch.finfo(before.dtype).eps
        while damping <= HIGHEST:
            solved = system.solve(damping)
            if solved is not None:
                d, slope = solved
                if slope <= eps * system.loss:  # what is left to gain is below rounding
                    self._move_to(before)
                    return start
                length = self._search(system.loss, d, before, loss)
                if length:
                    return min(max(_next(damping, length), _floor(eps)), HIGHEST)
            damping *= 10
        self._move_to(before)
        return HIGHEST

    def _search(self, best: float, d: Tensor, before: Tensor, loss: Callable[[], float]) -> float:
        """Move to the best of the step lengths, and return it; 0 if none lowers the loss."""
        found = 0.0
        for length in LENGTHS:
            self._move_to(before - length * d)
            now = loss()
            if falls(now, best):
                best, found = now, length
            elif found:
                break
        if found and length != found:
            self._move_to(before - found * d)
        return found

    def _dense(self, residuals: Sequence[Residual]) -> Dense:
        rows = Rows(self.model, residuals, self._named())
        return Dense(*rows.dense())

    def _named(self) -> dict[str, Tensor]:
        """Return the trainable parameters by the names that they have in the model."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for p in self.trainable:
            if p not in names:
                raise ValueError(f"a parameter of shape {list(p.shape)} is not one of the model's")
        return {names[p]: p for p in self.trainable}


def _residuals(given: Any) -> list[Residual]:
    """Return the residuals that a step was given."""
    found = [given] if isinstance(given, Residual) else list(given) if isinstance(given, list | tuple) else []
    if not found or not all(isinstance(x, Residual) for x in found):
        raise TypeError(
            f"GaussNewton.step({type(given).__name__}): give it residuals, such as "
            "step([steepest.Residual(lambda u, x, y: u(x) - y, points, values)])"
        )
    return found


def _next(damping: float, length: float) -> float:
    """Return the damping after a step of this length."""
    return damping / 10 if length >= 0.25 else damping if length >= 0.03 else 10 * damping


def _floor(eps: float) -> float:
    return 45 * eps
