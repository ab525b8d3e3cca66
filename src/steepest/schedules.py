"""Schedules of the refresh frequency: functions from the step to the number of steps between refreshes.

A basis moves most at the beginning of training, so refreshes should be frequent there and rare later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.rule import check
from steepest.rule.intervals import integral


@dataclass(frozen=True)
class LinearSchedule:
    """A linear schedule from ``start`` to ``end`` steps between refreshes, over ``transition_steps`` steps.

    Example:
        >>> schedule = LinearSchedule(start=1, end=11, transition_steps=100)
        >>> [schedule(step) for step in (0, 50, 100, 1000)]
        [1, 6, 11, 11]
    """

    start: int
    end: int
    transition_steps: int

    def __post_init__(self) -> None:
        _check_ends(self.start, self.end, self.transition_steps)

    def __call__(self, step: int) -> int:
        done = min(step / self.transition_steps, 1.0)
        return round(self.start + (self.end - self.start) * done)


@dataclass(frozen=True)
class CosineSchedule:
    """A cosine schedule from ``start`` to ``end`` steps between refreshes, which changes slowly at both ends.

    Example:
        >>> schedule = CosineSchedule(start=1, end=11, transition_steps=100)
        >>> [schedule(step) for step in (0, 25, 50, 75, 100)]
        [1, 2, 6, 10, 11]
    """

    start: int
    end: int
    transition_steps: int

    def __post_init__(self) -> None:
        _check_ends(self.start, self.end, self.transition_steps)

    def __call__(self, step: int) -> int:
        done = (1 - math.cos(math.pi * min(step / self.transition_steps, 1.0))) / 2
        return round(self.start + (self.end - self.start) * done)


@dataclass(frozen=True)
class StepSchedule:
    """A piecewise constant schedule: each entry of ``frequencies`` maps a step to the frequency from that step on.

    Example:
        >>> schedule = StepSchedule({0: 1, 100: 5, 1000: 10})
        >>> [schedule(step) for step in (0, 99, 100, 5000)]
        [1, 1, 5, 10]
    """

    frequencies: Mapping[int, int] = field(default_factory=lambda: {0: 1})

    def __post_init__(self) -> None:
        check(0 in self.frequencies, "frequencies", dict(self.frequencies), "a mapping with a frequency from step 0 on")
        for step, frequency in self.frequencies.items():
            check(integral(step) and step >= 0, "a step of frequencies", step, "an integer >= 0")
            check(integral(frequency) and frequency >= 1, f"frequencies[{step}]", frequency, "an integer >= 1")

    def __hash__(self) -> int:
        return hash(frozenset(self.frequencies.items()))

    def __call__(self, step: int) -> int:
        return self.frequencies[max(start for start in self.frequencies if start <= step)]


def _check_ends(start: int, end: int, transition_steps: int) -> None:
    for name, value in (("start", start), ("end", end), ("transition_steps", transition_steps)):
        check(integral(value) and value >= 1, name, value, "an integer >= 1")
