"""Schedules of the refresh frequency: functions from the step to the number of steps between refreshes.

A basis moves most at the beginning of training, so refreshes should be frequent there and rare later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.rule import as_integer, as_number, check, integer, number


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
        _check_ends(self)

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
        _check_ends(self)

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
        given = self.frequencies
        plain = {as_integer(step): as_integer(every) for step, every in dict(given).items()}
        check(0 in plain, "frequencies", given, "a mapping with a frequency from step 0 on")
        for step, every in plain.items():
            check(integer(step) and step >= 0, "a step of frequencies", step, "an integer >= 0")
            check(integer(every) and every >= 1, f"frequencies[{step}]", every, "an integer >= 1")
        object.__setattr__(self, "frequencies", plain)

    def __hash__(self) -> int:
        return hash(frozenset(self.frequencies.items()))

    def __call__(self, step: int) -> int:
        return self.frequencies[max(start for start in self.frequencies if start <= step)]


def _check_ends(schedule: LinearSchedule | CosineSchedule) -> None:
    for name in ("start", "end", "transition_steps"):
        value = getattr(schedule, name)
        plain = as_number(value)
        check(number(plain) and plain >= 1, name, value, "a finite number >= 1")
        object.__setattr__(schedule, name, plain)
