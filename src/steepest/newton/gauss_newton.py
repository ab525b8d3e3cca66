"""Gauss-Newton for least squares, with Levenberg's damping and backtracking.

    minimize f(θ) = ½ ‖r(θ)‖²        J = ∂r/∂θ   [R, P]
    d = (Jᵀ J + λ s I)⁻¹ Jᵀ r        s = ‖J‖_F² / R
    θ ← θ - t d                      t = 1, ½, ¼ ... 2⁻⁷, as long as f goes on falling

λ falls to a tenth after a step of t ≥ ¼, and grows tenfold after one of t < 0.03, and whenever no t lowers f. So the
damping of Levenberg ("A method for the solution of certain non-linear problems in least squares", 1944) follows the
accepted length, and not, as in Marquardt's rule, the ratio of the actual to the predicted reduction.
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
from steepest.newton.iterative import Iterative
from steepest.newton.products import Jacobian
from steepest.newton.residual import Residual, Rows, half_square, joined, summed

LENGTHS = [0.5**k for k in range(8)]
"""The step lengths that are tried."""
LOWEST, HIGHEST = 1e-14, 1e10
"""The least damping; and that with which no step lowers the loss where none does with less."""
SIDE, ENTRIES = 8192, 2**28
"""The largest matrix that "auto" decomposes, and the largest Jacobian that it forms: 0.5 and 2 GiB in float64."""


Evaluation = Callable[[float], float]
"""Evaluates the loss at the present weights; where it is not below the number given, a part that isn't will do."""


class System(Protocol):
    """The linear system of one step."""

    loss: float
    finite: bool
    """Whether a step can be computed."""

    def solve(self, damping: float) -> tuple[Tensor, float] | None:
        """Return d ``[P]``, and its product with the gradient; None where that fails."""

    def renew(self) -> Any:
        """Prepare for another solution after the weights have been elsewhere."""


class GaussNewton(FlatOptimizer):
    """Gauss-Newton for least squares of up to some thousand parameters or residuals; it has no learning rate.

    It is for physics-informed networks, curve fitting and small models of physics, with all points in each step or
    large batches, and not for language models. Weights and points should be float64: float32 ends at relative errors
    of about 1e-5.

    Args:
        model: the network that residuals are evaluated with.
        params: the parameters to move, or groups of them; by default all that require a gradient.
        damping: λ of the first step. Later ones follow from the lengths of the steps.
        solver: "dense" forms the Jacobian ``[R, P]`` and decomposes a matrix of its shorter side. "cg" finds a
            direction by conjugate gradients with a Nyström preconditioner. "auto" is "dense" for `Residual`s with
            min(P, R) ≤ 8192 and P · R ≤ 2²⁸, otherwise "cg"; the optimizer's ``repr`` says which it was.
        products: the largest number of products with the Gauss-Newton matrix for a direction of "cg".
        rank: the rank of its preconditioner, which costs as many products once a step.

    Raises:
        ValueError: for options out of range, for parameters that the model doesn't have, and where it has none.

    Example:
        >>> import torch, steepest
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> x = torch.linspace(-3, 3, 40, dtype=torch.float64)[:, None]
        >>> fit = steepest.Residual(lambda u, x, y: u(x) - y, x, x.sin())
        >>> optimizer = steepest.GaussNewton(model)
        >>> for _ in range(30):
        ...     loss = optimizer.step([fit])
        >>> bool((model(x) - x.sin()).abs().max() < 1e-2)
        True
    """

    checks: ClassVar = {
        "damping": (lambda x: isinstance(x, float | int) and 0 < x < math.inf, "a number above 0"),
        "solver": (lambda x: x in ("auto", "dense", "cg"), "'auto', 'dense' or 'cg'"),
        "products": (lambda x: isinstance(x, int) and x > 0, "an integer above 0"),
        "rank": (lambda x: isinstance(x, int) and x > 0, "an integer above 0"),
    }
    copied: ClassVar = ("model",)
    vectors: ClassVar = ("direction",)
    _solved = "no step yet"

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        damping: float = 1e-3,
        solver: str = "auto",
        products: int = 200,
        rank: int = 50,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"GaussNewton({type(model).__name__}): the first argument is the model, an nn.Module")
        self.model = model
        moved = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
        if not moved:
            raise ValueError("GaussNewton needs parameters that require a gradient; the model has none")
        super().__init__(moved, {"damping": damping, "solver": solver, "products": products, "rank": rank})
        self._named()
        dtype = next(p for group in self.param_groups for p in group["params"]).dtype
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"parameters of {dtype}: GaussNewton needs float64, as of model.double(), or float32")
        if dtype == torch.float32:
            warnings.warn(
                "GaussNewton on float32 parameters: below relative errors of about 1e-5 it needs float64, as "
                "model.double() and points of float64",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
        """Make one step, which never raises the loss, and return the loss ``[]`` before it.

        Args:
            closure: one or several `Residual`s, whose losses are added. Or a function without arguments, which returns
                a tensor of residuals in their graph, for half their sum of squares, or the outputs of the model and
                any loss that is convex in them. It is called several times a step and must not call ``backward``.

        Where the loss or its Jacobian is not finite at the weights, nothing changes; `skipped` counts that.

        Raises:
            TypeError: without residuals.
            ValueError: where the residuals do not fit the solver. Nothing has changed then.
        """
        self._check()
        residuals, entries = _residuals(closure), self._memory()
        if residuals:
            system, loss = self._of_residuals(residuals, entries)
        else:
            system, loss = self._of_closure(closure, entries)
        entries["step"] += 1
        if not system.finite:
            entries["skipped"] += 1
            return self.trainable[0].new_tensor(system.loss)
        with self._restoring() as before:
            entries["damping"].fill_(self._descend(system, float(entries["damping"]), before, loss))
            if isinstance(system, Iterative):
                entries["direction"].copy_(before - self._weights())
        return before.new_tensor(system.loss)

    @property
    def skipped(self) -> int:
        """Return the number of steps that changed nothing, because the loss or its derivatives were not finite."""
        return int(self._memory().get("skipped", 0))

    def _layout(self, length: int) -> dict[str, tuple[int, ...]]:
        return {"step": (), "skipped": (), "damping": (), "direction": (length,)}

    def _begin(self) -> dict[str, float]:
        return {"damping": self.options["damping"]}

    def __repr__(self) -> str:
        """Return the options, and how the latest step was solved."""
        return f"{super().__repr__()[:-1]}    latest step: {self._solved}\n)"

    def _descend(self, system: System, damping: float, before: Tensor, loss: Evaluation) -> float:
        """Move to the best of the weights that are tried, and return the next damping."""
        start, eps = damping, torch.finfo(before.dtype).eps
        smallest = eps * float(before.norm())
        while damping <= HIGHEST:
            solved = system.solve(damping)
            if solved is not None:
                d, slope = solved
                if slope <= eps * abs(system.loss) or float(d.norm()) <= smallest:  # what is left is below rounding
                    return start
                length = self._search(system.loss, d, before, loss)
                if length:
                    return min(max(_next(damping, length), LOWEST), HIGHEST)
                self._move_to(before)
                system.renew()
            damping *= 10
        return HIGHEST

    def _search(self, best: float, d: Tensor, before: Tensor, loss: Evaluation) -> float:
        """Move to the best of the step lengths, and return it; 0 if none lowers the loss."""
        found = 0.0
        for length in LENGTHS:
            self._move_to(before - length * d)
            now = loss(best)
            if falls(now, best):
                best, found = now, length
            elif found:
                break
        if found and length != found:
            self._move_to(before - found * d)
        return found

    def _of_residuals(self, residuals: Sequence[Residual], entries: dict[str, Any]) -> tuple[System, Evaluation]:
        """Return the system of residuals, and what evaluates their loss."""
        solver, rows = self.options["solver"], Rows(self.model, residuals, self._named())
        fits = min(rows.shape) <= SIDE and math.prod(rows.shape) <= ENTRIES
        if solver == "dense" and not fits:
            raise ValueError(_too_large(*rows.shape))
        if solver != "cg" and fits:
            return self._dense(*rows.dense()), lambda enough: summed(self.model, residuals, enough)

        def evaluate() -> tuple[Tensor, None]:
            with torch.enable_grad():
                return joined(self.model, residuals), None

        return self._iterative(evaluate, entries), lambda enough: summed(self.model, residuals, enough)

    def _of_closure(self, closure: Callable[[], Any], entries: dict[str, Any]) -> tuple[System, Evaluation]:
        """Return the system of what a closure returns, and what evaluates its loss."""

        def evaluate(_: float) -> float:
            outputs, loss = _outputs_and_loss(closure)
            return half_square(outputs) if loss is None else float(loss)

        if self.options["solver"] != "dense":
            return self._iterative(lambda: _outputs_and_loss(closure), entries), evaluate
        outputs, loss = _outputs_and_loss(closure)
        R, P = outputs.numel(), sum(p.numel() for p in self.trainable)
        if loss is not None:
            raise ValueError("solver='dense' is for least squares: for the outputs and another loss give solver='cg'")
        if min(R, P) > SIDE or R * P > ENTRIES:
            raise ValueError(_too_large(R, P))
        return self._dense(Jacobian(outputs, self.trainable).dense(), outputs.detach().reshape(-1)), evaluate

    def _dense(self, J: Tensor, r: Tensor) -> Dense:
        system = Dense(J, r)
        self._solved = f"dense, {'dual' if system.dual else 'primal'}, {len(J)} residuals, {J.shape[1]} parameters"
        return system

    def _iterative(self, evaluate: Callable[[], Any], entries: dict[str, Any]) -> Iterative:
        direction, params = entries["direction"], self.trainable
        P, rank = sum(p.numel() for p in params), self.options["rank"]
        start = 0.7 * direction if bool(direction.any()) else None
        seed, products = int(entries["step"]), self.options["products"]
        system = Iterative(evaluate, params, start, products=products, rank=rank, seed=seed)
        self._solved = f"cg, Nyström preconditioner of rank {rank}, {system.size} outputs, {P} parameters"
        return system

    def _named(self) -> dict[str, Tensor]:
        """Return the trainable parameters by the names that they have in the model."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for p in self.trainable:
            if p not in names:
                raise ValueError(f"a parameter of shape {list(p.shape)} is not one of the model's")
        return {names[p]: p for p in self.trainable}


def _residuals(given: Any) -> list[Residual]:
    """Return the residuals that a step was given; none if that is a closure."""
    found = [given] if isinstance(given, Residual) else list(given) if isinstance(given, list | tuple) else []
    if (found or not callable(given)) and not (found and all(isinstance(x, Residual) for x in found)):
        raise TypeError(
            f"GaussNewton.step({given!r}): give it residuals, such as step([steepest.Residual(lambda u, x, y: "
            "u(x) - y, points, values)]), or a closure that returns a tensor of residuals or (outputs, loss)"
        )
    return found


def _outputs_and_loss(closure: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
    """Return the outputs and the loss of a closure, or residuals and None."""
    with torch.enable_grad():
        given = closure()
    outputs, loss = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(outputs, Tensor) or not outputs.dim():
        raise TypeError(
            f"GaussNewton's closure returned {given!r}: it must return residuals as a tensor of one or more "
            "dimensions, or (outputs, loss); for a loss alone there is steepest.NewtonCG"
        )
    if loss is not None and (not isinstance(loss, Tensor) or loss.dim()):
        raise TypeError(
            f"GaussNewton's closure returned (outputs, {loss!r}): the loss must be a tensor without dimensions"
        )
    return outputs, loss


def _too_large(R: int, P: int) -> str:
    return (
        f"solver='dense' with {R} residuals and {P} parameters: the smaller number must not exceed {SIDE}, nor their "
        f"product {ENTRIES}. Take fewer points in a step, a smaller network, or solver='cg'"
    )


def _next(damping: float, length: float) -> float:
    """Return the damping after a step of this length."""
    return damping / 10 if length >= 0.25 else damping if length >= 0.03 else 10 * damping
