"""What is shown: everything that was read, by rule, and by parameter if that is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from steepest.engine.roster import Roster
from steepest.rule import Refreshing
from steepest.stack.stack import Stack


@dataclass
class Tally:
    """What was found of some matrices: those of one parameter, or all under one rule."""

    sums: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    def shown(self) -> dict[str, float]:
        """Return one number for each quantity."""
        found, sums = {}, self.sums
        if sums.get("entries", 0) > 0:
            found["update_rms"] = math.sqrt(sums["squares"] / sums["entries"])
            if sums["weights"] > 0:
                found["update_to_weight"] = math.sqrt(sums["moved"] / sums["weights"])
        for what, numbers in self.numbers.items():
            if known := [x for x in numbers if not math.isnan(x)]:
                mean = sum(known) / len(known)
                found[what] = {"effective_rank": mean, "failed_decompositions": sum(known)}.get(what, max(known))
        return found


class Tallies:
    """The tallies of all rules, and of all parameters if they are wanted."""

    def __init__(self, roster: Roster, per_parameter: bool) -> None:
        self.roster = roster
        self.per_parameter = per_parameter
        self.found: dict[str, Tally] = {}

    def of(self, index: int) -> list[Tally]:
        """Return the tallies that a parameter belongs to."""
        rule = self.roster.rules[self.roster.numbers[index]].name
        keys = [rule, f"{rule}/{self.roster.names[index]}"] if self.per_parameter else [rule]
        return [self.found.setdefault(key, Tally()) for key in keys]

    def add_update(self, index: int, what: str, number: float) -> None:
        """Add one of `UPDATES` of a parameter."""
        for tally in self.of(index):
            tally.sums[what] = tally.sums.get(what, 0.0) + number

    def add_factors(self, stack: Stack, what: str, numbers: Sequence[float]) -> None:
        """Add a quantity of all slots of a stack."""
        for segment in stack.segments:
            for tally in self.of(segment.index):
                tally.numbers.setdefault(what, []).extend(numbers[segment.slots])

    def add_ages(self, stack: Stack, offsets: Sequence[float]) -> None:
        """Add the numbers of steps since the last refresh was due, of all slots of a stack."""
        clocks = stack.clock.tolist()
        for number, start, stop in stack.groups:
            rule = self.roster.rules[number]
            if isinstance(rule, Refreshing) and any(name.startswith(("Q_", "P_")) for name in stack.state):
                age = cache(rule_age(rule))
                ages = [math.nan] * stack.size
                ages[start:stop] = [age(clocks[slot], offsets[slot]) for slot in range(start, stop)]
                self.add_factors(stack, "refresh_age", ages)

    def shown(self) -> dict[str, float]:
        """Return everything under flat keys."""
        return {f"{key}/{name}": x for key, tally in self.found.items() for name, x in tally.shown().items()}


def rule_age(rule: Refreshing[Any]) -> Callable[[int, float], float]:
    """Return the steps since a refresh was due, by clock and offset: 0 if it was in the latest step; NaN if never.

    >>> from steepest.rules import RULES
    >>> age = rule_age(RULES["soap"](precondition_frequency=5))
    >>> [age(clock, 0.0) for clock in (0, 1, 3, 6, 7)]
    [nan, 0.0, 2.0, 0.0, 1.0]
    """

    def age(clock: int, offset: float) -> float:
        return next((float(clock - 1 - at) for at in range(clock - 1, -1, -1) if rule.due(at, offset)), math.nan)

    return age
