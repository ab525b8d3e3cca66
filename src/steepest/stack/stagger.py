"""Staggered refreshes: each matrix gets an offset in its period, so that not all refresh in the same step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapreplace
from typing import Any

from steepest.rule import Rule
from steepest.stack.stack import Stack
from steepest.view import View

Offsets = Mapping[tuple[int, int, int], float]
"""Refresh offsets by the number of the parameter, of the piece, and of the matrix in it."""

Job = tuple[tuple[int, Any], int, View]
"""What a parameter is ordered by, its number, and its view."""


def stagger_offsets(costs: Sequence[float], period: int) -> list[int]:
    """Return an offset in ``[0, period)`` for each job, so that the steps of a period cost about the same.

    The most expensive job comes first, and each job goes to the offset with the least cost so far. A single job gets
    offset 0, and so behaves as if refreshes were not staggered.

    >>> stagger_offsets([8.0, 1.0, 8.0, 1.0], period=2), stagger_offsets([5.0], period=10)
    ([0, 0, 1, 1], [0])
    """
    offsets = [0] * len(costs)
    loads = [(0.0, offset) for offset in range(min(period, len(costs)))]  # a heap: the least load, the least offset
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        load, offsets[job] = loads[0]
        heapreplace(loads, (load + costs[job], offsets[job]))
    return offsets


def spread_offsets(costs: Sequence[float]) -> list[float]:
    """Return an offset in ``[0, 1)`` for each job, a fraction of a period, so that steps cost about the same.

    This is for periods that change. Jobs are at equal distances. The first of them by cost, however many, are far from
    each other, because the bits of their numbers are read in reverse, as in van der Corput's sequence.

    >>> spread_offsets([5.0, 4.0, 3.0, 2.0]), spread_offsets([5.0])
    ([0.0, 0.5, 0.25, 0.75], [0.0])
    """
    jobs = range(len(costs))
    by_cost = sorted(jobs, key=lambda job: -costs[job])
    offsets = [0.0] * len(costs)
    for place, number in enumerate(sorted(jobs, key=lambda number: f"{number:032b}"[::-1])):
        offsets[by_cost[number]] = place / len(costs)
    return offsets


def dealt(rule: Rule, jobs: Sequence[Job]) -> Offsets:
    """Return the refresh offsets of all matrices of some parameters, which share a rule, as fractions of its period.

    Matrices are ordered by the name of their parameter, or by its position if there are no names. So neither thawing
    nor loading by name in another order changes an offset, and it makes no difference which rank steps which matrix.
    """
    matrices = sorted(
        (order, piece, k, index, m, n)
        for order, index, view in jobs
        for piece, (b, m, n) in enumerate(view.pieces)
        for k in range(b)
    )
    costs = [rule.refresh_cost(m, n) for *_, m, n in matrices]
    if callable(getattr(rule, "precondition_frequency", None)):
        offsets = spread_offsets(costs)
    else:
        offsets = [offset / rule.period(0) for offset in stagger_offsets(costs, rule.period(0))]
    return {(i, piece, k): offset for (_, piece, k, i, *_), offset in zip(matrices, offsets, strict=True)}


def slot_offsets(offsets: Offsets, stack: Stack) -> list[float]:
    """Return the refresh offset of each slot of a stack; matrices without one are not staggered."""
    return [offsets.get((*s.key, s.first + k), 0.0) for s in stack.segments for k in range(s.stop - s.start)]
