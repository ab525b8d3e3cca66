"""L-BFGS: a quasi-Newton method with the memory of the last steps, and a line search.

    d = -H g                               H from the last h pairs (steepest.newton.pairs); at first the identity
    t: strong Wolfe, from the first trial  lr                     with pairs
                                           lr min(1, 1 / ‖g‖₁)    without
    θ ← θ + t d

Liu and Nocedal, Math. Program. 45 (1989) 503; Nocedal and Wright, Numerical Optimization, 2nd edition, Algorithm 7.5.
The options, their defaults and the rules to stop are those of torch.optim.LBFGS, but for the line search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steepest.linalg.surroundings import without_autocast
from steepest.newton.flat import FlatOptimizer
from steepest.newton.line_search import Point, strong_wolfe
from steepest.newton.pairs import VECTORS, direction, forget, remember, shapes

TRIALS = 25
"""The most evaluations of one line search."""

Closure = Callable[[], Any]


class LBFGS(FlatOptimizer):
    """L-BFGS with a strong Wolfe line search: for smooth losses on all data, or large batches.

    A step takes up to ``max_iter`` iterations. The state is two matrices of ``history_size`` rows with an entry for
    each parameter; so memory is ``2 history_size`` times that of the parameters, and more than that of the model where
    it is large.

    A line search that finds no lower loss leaves the weights as they were, bit for bit, and the memory of pairs is
    emptied. A loss that is NaN or infinite, or whose gradient is, or is too large to square, counts as too far; a step
    that starts at one changes nothing, and is counted in ``skipped``. A parameter without a gradient stays.

    Args:
        params: a model, tensors, groups with the same options, or ``(name, tensor)`` pairs. Frozen parameters take no
            part; the memory begins anew where parameters are frozen, thawed, replaced or added.
        lr: the first step length that a line search tries, or the step length without line search. 1 is Newton's.
        max_iter: the most iterations of a step.
        max_eval: the most calls of the closure in a step, those of line searches among them; by default 5/4 max_iter.
        tolerance_grad: a step ends where no entry of the gradient is larger.
        tolerance_change: a step ends where neither an entry of the weights nor the loss changes by more, or the loss
            can't fall by more along the direction. 0 suits losses that are small by nature.
        history_size: the number of pairs.
        line_search: "strong_wolfe"; or None for steps of length ``lr``, which may raise the loss.

    Raises:
        ValueError: for options out of range, and parameters that don't fit in one vector.

    Example:
        >>> import steepest
        >>> x = torch.nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))
        >>> optimizer = steepest.LBFGS([x], max_iter=50)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> bool((x - 1).abs().max() < 1e-5)
        True
    """

    checks: ClassVar = {
        "lr": (lambda x: _number(float(x) if isinstance(x, Tensor) and x.numel() == 1 else x), "a number >= 0"),
        "max_iter": (lambda x: _count(x), "an integer >= 1"),
        "max_eval": (lambda x: _count(x), "an integer >= 1"),
        "tolerance_grad": (lambda x: _number(x), "a number >= 0"),
        "tolerance_change": (lambda x: _number(x), "a number >= 0"),
        "history_size": (lambda x: _count(x), "an integer >= 1"),
        "line_search": (lambda x: x in ("strong_wolfe", None), "'strong_wolfe' or None"),
    }

    copied: ClassVar = ("evaluations", "skipped")
    vectors: ClassVar = VECTORS
    evaluations = 0
    """The calls of closures so far."""
    skipped = 0
    """The steps so far that did nothing, because the loss or its gradient was not finite where they began."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search: Literal["strong_wolfe"] | None = "strong_wolfe",
    ) -> None:
        options = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max(1, max_iter * 5 // 4) if max_eval is None and _count(max_iter) else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search": line_search,
        }
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Make up to ``max_iter`` iterations, and return the loss before them as the closure returned it.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` on it, and returns it.

        Raises:
            TypeError: without a closure, or if it returns nothing.
        """
        if not callable(closure):
            raise TypeError(
                f"LBFGS.step({closure!r}): the closure must be a function that clears the gradients, computes the "
                "loss, calls backward on it and returns it, because a step evaluates the loss at several points"
            )
        self._check()
        if not sum(p.numel() for p in self.trainable):
            with torch.enable_grad():
                return closure()
        with self._restoring() as before:
            state = self._memory()
            loss = _Loss(self, closure, state)
            value, g = loss.here()
            if not (math.isfinite(value) and math.isfinite(_dot(g, g))):
                self.skipped += 1
            elif float(self.options["lr"]) > 0 and g.abs().max() > self.options["tolerance_grad"]:
                self._iterate(loss, state, before.to(g.dtype), value, g)
            return loss.first

    def _iterate(self, loss: _Loss, state: dict[str, Any], x: Tensor, value: float, g: Tensor) -> None:
        """Move from the weights ``x [P]``, where the loss has this value and the gradient ``g [P]``."""
        o = self.options
        lr, small, fixed = float(o["lr"]), o["tolerance_change"], o["line_search"] is None
        moves = self._join([None if p.grad is None else torch.ones_like(p) for p in self.trainable])  # [P], 0 or 1
        remember(state, state["last_step"], g - state["last_gradient"])
        state["last_step"].zero_()
        for iteration in range(1, o["max_iter"] + 1):
            state["step"] += 1
            d = direction(state, g) * moves
            slope = _dot(g, d)
            if not slope < 0:  # the pairs hold nothing but rounding
                forget(state)
                d, slope = -g, -_dot(g, g)
            if slope > -small:
                break
            t = lr if state["pairs"] else lr * min(1.0, 1.0 / float(g.abs().sum()))
            if fixed and (iteration == o["max_iter"] or not loss.left):
                # The next step evaluates the gradient there anyway, and makes the pair.
                state["last_step"].copy_(self._go(x, d, t) - x)
                state["last_gradient"].copy_(g)
                break
            if not loss.left:
                break
            line, here = loss.along(x, d), Point(0.0, value, slope, g)
            if fixed:
                found = line(t)
            else:
                found = strong_wolfe(line, here, t, min(loss.left, TRIALS), small / float(d.abs().max()))
            if found.t and found.loss < math.inf:
                new = self._go(x, d, found.t)
                remember(state, new - x, found.gradient - g)
                moved, fell = float((new - x).abs().max()), abs(found.loss - value)
                x, value, g = new, found.loss, found.gradient
                if g.abs().max() <= o["tolerance_grad"] or moved <= small or fell < small:
                    break
                continue
            self._move_to(x)
            if iteration > 1 and not loss.left:
                break  # a search that was cut off says nothing against the pairs
            hopeless = not state["pairs"]
            forget(state)
            if hopeless:
                break

    def _go(self, x: Tensor, d: Tensor, t: float) -> Tensor:
        """Move the parameters to x + t d, and return where they are, which is rounded in half precision."""
        self._move_to(torch.add(x, d, alpha=t))
        return self._weights().to(x.dtype)

    def _layout(self, length: int) -> dict[str, tuple[int, ...]]:
        return shapes(self.options["history_size"], length)


class _Loss:
    """The loss of a step, which the closure evaluates ``max_eval`` times at most."""

    def __init__(self, optimizer: LBFGS, closure: Closure, state: dict[str, Any]) -> None:
        self._optimizer, self._closure, self._state = optimizer, closure, state
        self.left: int = optimizer.options["max_eval"]
        self.first: Any = None
        """What the closure returned when it was called first."""

    def here(self) -> tuple[float, Tensor]:
        """Return the loss and its gradient ``[P]`` at the present weights."""
        with torch.enable_grad():
            loss = self._closure()
        if loss is None:
            raise TypeError("the closure returned None: it must return the loss")
        self.first = loss if self.first is None else self.first
        self.left -= 1
        self._optimizer.evaluations += 1
        grads = [p.grad for p in self._optimizer.trainable]
        g = self._optimizer._join([x.to_dense() if x is not None and x.is_sparse else x for x in grads])
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return value, g.to(self._state["steps"].dtype)

    def along(self, x: Tensor, d: Tensor) -> Callable[[float], Point]:
        """Return the function that evaluates the points x + t d."""

        def at(t: float) -> Point:
            self._optimizer._go(x, d, t)
            loss, g = self.here()
            slope = _dot(g, d)
            return Point(t, loss if math.isfinite(loss) and math.isfinite(slope) else math.inf, slope, g)

        return at


@without_autocast
def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b))


def _number(x: Any) -> bool:
    return isinstance(x, float | int) and not isinstance(x, bool) and 0 <= x < math.inf


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1
