"""The line search for the strong Wolfe conditions, with cubic interpolation.

    φ(t) = f(θ + t d)              φ(t) ≤ φ(0) + c₁ t φ'(0)        the loss falls enough
                                   |φ'(t)| ≤ c₂ |φ'(0)|            and has flattened

Nocedal and Wright, Numerical Optimization, 2nd edition: Algorithms 3.5 (`_bracket`) and 3.6 (`_zoom`), and equation
3.59 (`cubic_minimum`). The book leaves the safeguards of the interpolation open. Here they are those of Schmidt's
minFunc, which torch.optim.LBFGS has, too: a longer step is 1.01 to 10 times as far away as the last one, and the second
of two steps near an end of the bracket is a tenth of the bracket away from it.

A loss or a slope that is not finite counts as an infinite loss, so the step was too far, and the bracket is halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

DECREASE, FLATNESS = 1e-4, 0.9
"""c₁ and c₂, the book's values for quasi-Newton methods."""
NEAR = 0.1
"""The part of a bracket that counts as near to its end."""


class Point(NamedTuple):
    """A point of the line."""

    t: float
    loss: float  # φ(t), infinite if it or the slope isn't finite
    slope: float  # φ'(t)
    gradient: Tensor  # [P], at θ + t d


def strong_wolfe(at: Callable[[float], Point], start: Point, t: float, most: int, narrow: float = 0.0) -> Point:
    """Return a point that meets the strong Wolfe conditions, or the best that was found.

    Args:
        at: evaluates the point at a step length.
        start: the point at t = 0, whose slope is negative.
        t: the first step length, above 0.
        most: the largest number of evaluations, 1 or more.
        narrow: the length of a bracket that is not divided any more.

    Returns:
        The point. If the evaluations are used up, or the bracket is narrow, it is one whose loss falls enough, or else
        the lowest, since near a minimum rounding hides what is enough; ``start`` itself where none is lower.

    >>> import torch
    >>> line = lambda t: Point(t, (t - 3) ** 2, 2 * (t - 3), torch.zeros(1))
    >>> strong_wolfe(line, line(0.0), 1.0, most=25).t, strong_wolfe(line, line(0.0), 50.0, most=25).t
    (1.0, 3.0)
    """
    lowest = start

    def kept(t: float) -> Point:
        nonlocal lowest
        point = at(t)
        lowest = point if point.loss < lowest.loss else lowest
        return point

    found = _bracket(kept, start, t, most, narrow)
    return lowest if found is start else found


def _bracket(at: Callable[[float], Point], start: Point, t: float, most: int, narrow: float) -> Point:
    """Lengthen the step until it is enough or too far; Algorithm 3.5."""
    previous = start
    for number in range(most):
        point, left = at(t), most - number - 1
        if _too_far(point, start) or (number and point.loss >= previous.loss):
            return _zoom(at, start, previous, point, left, narrow)
        if _flat(point, start):
            return point
        if point.slope >= 0:
            return _zoom(at, start, point, previous, left, narrow)
        t = cubic_minimum(previous, point, point.t + 0.01 * (point.t - previous.t), 10 * point.t)
        previous = point
    return previous


def _zoom(at: Callable[[float], Point], start: Point, low: Point, high: Point, left: int, narrow: float) -> Point:
    """Divide the bracket between ``low`` and ``high``, and return its best point; there are ``left`` evaluations.

    ``low`` is the best point so far whose loss falls enough, and φ falls from there towards ``high``.
    """
    was_near = False
    while left and abs(high.t - low.t) > narrow:
        ends = min(low.t, high.t), max(low.t, high.t)
        margin = NEAR * (ends[1] - ends[0])
        t = cubic_minimum(low, high, *ends)
        to_left, to_right = t - ends[0], ends[1] - t
        near = min(to_left, to_right) < margin
        if near and (was_near or min(to_left, to_right) <= 0):
            t, near = (ends[1] - margin if to_right < to_left else ends[0] + margin), False
        if t in ends:
            break  # there is no number in between
        was_near = near
        point, left = at(t), left - 1
        if _too_far(point, start) or point.loss >= low.loss:
            high = point
            continue
        if _flat(point, start):
            return point
        if point.slope * (high.t - low.t) >= 0:
            high = low
        low = point
    return low


def _too_far(point: Point, start: Point) -> bool:
    return not point.loss <= start.loss + DECREASE * point.t * start.slope


def _flat(point: Point, start: Point) -> bool:
    return abs(point.slope) <= -FLATNESS * start.slope


def cubic_minimum(one: Point, other: Point, least: float, most: float) -> float:
    """Return where the cubic through two points with their slopes is lowest, between two bounds.

    The middle of the bounds stands in for it where the cubic has no minimum, or a number is not finite.

    >>> from torch import zeros
    >>> points = [Point(t, t**3 - 3 * t, 3 * t**2 - 3, zeros(1)) for t in (0.0, 3.0)]
    >>> cubic_minimum(*points, 0.0, 3.0), cubic_minimum(*points, 2.0, 3.0)
    (1.0, 2.0)
    >>> cubic_minimum(points[0], Point(2.0, float("inf"), 0.0, zeros(1)), 0.0, 2.0)
    1.0
    """
    a, b = (one, other) if one.t <= other.t else (other, one)
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return (least + most) / 2
    d2 = math.sqrt(square)
    denominator = b.slope - a.slope + 2 * d2
    if denominator == 0:
        return (least + most) / 2
    return min(max(b.t - (b.t - a.t) * ((b.slope + d2 - d1) / denominator), least), most)
