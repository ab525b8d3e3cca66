"""When refreshes come whose frequency is a function of the clock: no state, since that is a function of the clock, too.

Time is cut into intervals. The first one begins with the first refresh, and the next one at the first clock c at which
an interval that began at b is ``period(c)`` steps old or older. So without staggering a matrix refreshes where an
interval begins. Staggered matrices refresh at fractions of each interval, by a phase that rises by one in each of them.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from steepest.rule.options import as_integer, integer

Schedule = Callable[[int], int]
"""A function from the clock to the number of steps between refreshes. It is called once for each clock."""


def steps_between(schedule: Schedule, clock: int) -> int:
    """Return the number of steps between refreshes that a schedule gives for a clock.

    Example:
        >>> steps_between(lambda clock: 1 + clock // 10, 25)
        3
    """
    given = schedule(clock)
    steps: int = as_integer(given)
    if not (integer(steps) and steps >= 1):
        raise ValueError(
            f"precondition_frequency={schedule!r} gives {given!r} at clock {clock}: must give an integer >= 1"
        )
    return steps


class Intervals:
    """The intervals between refreshes under a schedule, from the clock ``first`` on.

    Example:
        >>> intervals = Intervals(lambda clock: 2 + clock // 4, first=0)
        >>> [clock for clock in range(20) if intervals.passes(clock, 0.0)]
        [0, 2, 5, 9, 14]
        >>> [clock for clock in range(20) if intervals.passes(clock, 0.5)]
        [1, 3, 7, 11, 17]
    """

    def __init__(self, schedule: Schedule, first: int) -> None:
        self.schedule = schedule
        self.first = first
        self._number, self._begin = 0, first  # of the interval that the last known clock is in
        self._phases = array("d")  # by clock

    def passes(self, clock: int, offset: float) -> bool:
        """Whether the phase passes ``offset``, or an integer more than that, at this clock, a fraction in [0, 1)."""
        before = self._phase(clock - 1) if clock > self.first else 0.0
        return math.ceil(self._phase(clock) - offset) > math.ceil(before - offset)

    def _phase(self, clock: int) -> float:
        """The number of intervals before this one, and the part of it that is over in the middle of this step."""
        for c in range(self.first + len(self._phases), clock + 1):
            steps = steps_between(self.schedule, c)
            if c - self._begin >= steps:
                self._number, self._begin = self._number + 1, c
            phase = self._number + (c - self._begin + 0.5) / steps
            self._phases.append(max(phase, self._phases[-1]) if self._phases else phase)  # a period may grow or shrink
        return self._phases[clock - self.first]


def intervals(schedule: Any, first: int) -> Intervals:
    """Return the intervals of a schedule from the clock ``first`` on, the same object at each call."""
    return _intervals(schedule.__call__, first)  # a method's hash is by identity, and objects may have none


@lru_cache(maxsize=256)
def _intervals(method: Any, first: int) -> Intervals:
    return Intervals(getattr(method, "__self__", method), first)
