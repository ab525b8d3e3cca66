"""The line search: the strong Wolfe conditions, few evaluations, and lines without a lower point."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from functions import F64, Function
from torch import Tensor

from steepest.newton.line_search import DECREASE, FLATNESS, Point, strong_wolfe

LINES: dict[str, Callable[[Tensor], Tensor]] = {
    "convex": lambda t: (t - 3) ** 2,
    "steep": lambda t: (t - 0.01) ** 2,
    "far": lambda t: (t - 1e4) ** 2,
    "wavy": lambda t: 0.05 * (t - 2) ** 2 + torch.sin(3 * t + 2),
    "quartic": lambda t: t**4 - 3 * t**3 - t,
    "log": lambda t: -torch.log(2 * t + 1e-3) + 8 * t,
    "undefined from 0.4 on": lambda t: -torch.log(0.4 - t) - 5 * t,
    "infinite from 1.5 on": lambda t: torch.where(t < 1.5, -t + 0.2 * t**2, math.inf),
}


def line(f: Function, calls: list[float] | None = None) -> Callable[[float], Point]:
    def at(t: float) -> Point:
        if calls is not None:
            calls.append(t)
        x = torch.tensor(t, dtype=F64, requires_grad=True)
        value = f(x)
        (slope,) = torch.autograd.grad(value, x)
        finite = bool(value.isfinite() & slope.isfinite())
        return Point(t, value.item() if finite else math.inf, slope.item(), slope)

    return at


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("name", LINES)
def test_the_point_meets_the_strong_wolfe_conditions(name: str, first: float) -> None:
    calls: list[float] = []
    at = line(LINES[name], calls)
    start = at(0.0)
    found = strong_wolfe(at, start, first, most=60)
    assert found.loss <= start.loss + DECREASE * found.t * start.slope
    assert abs(found.slope) <= FLATNESS * abs(start.slope)
    assert len(calls) <= 31
    assert min(calls) >= 0


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_the_number_of_evaluations_is_kept(most: int) -> None:
    for f in LINES.values():
        calls: list[float] = []
        at = line(f, calls)
        start = line(f)(0.0)
        found = strong_wolfe(at, start, 50.0, most)
        assert len(calls) <= most
        assert found is start or found.loss < start.loss


def test_a_line_without_a_lower_point_returns_the_start() -> None:
    start = Point(0.0, 1.0, -1.0, torch.zeros(1))
    for bad in (math.inf, 2.0):
        for narrow, calls in ((0.0, 1100), (0.1, 6)):
            seen: list[float] = []

            def at(t: float, bad: float = bad, seen: list[float] = seen) -> Point:
                seen.append(t)
                return Point(t, bad, 1.0, torch.ones(1))

            assert strong_wolfe(at, start, 1.0, 2000, narrow) is start
            assert len(seen) < calls


def test_where_no_loss_falls_enough_the_lowest_is_taken() -> None:
    """Near a minimum what is enough is below the rounding of the loss."""
    losses = iter([1.0, 1 - 1e-9, 1 - 3e-9, 1 - 2e-9, 1.0])
    found = strong_wolfe(
        lambda t: Point(t, next(losses), 1.0, torch.ones(1)), Point(0.0, 1.0, -1e3, torch.ones(1)), 1.0, most=5
    )
    assert found.loss == 1 - 3e-9
