"""Rules with something slow in them, a basis or an inverse root, that is renewed every so many steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from steepest.rule.options import at_least, frequency
from steepest.rule.rule import Rule

THE_END = 10**9
"""A clock at which every schedule of refreshes has arrived."""


@dataclass(frozen=True, kw_only=True)
class Refreshing(Rule):
    """A rule with something slow, bases or roots of Kronecker factors, that is renewed every so many steps.

    A matrix counts in its own time, ``clock``, the updates that it has had; its first refresh comes at
    ``first_refresh`` (0 unless a rule warms up), whatever the frequency.
    """

    precondition_frequency: int | Callable[[int], int] = frequency(1)
    max_precond_dim: int = at_least(0, 8192)

    @property
    def first_refresh(self) -> int:
        """The clock at which a matrix gets its first basis."""
        return 0

    def stage(self, clock: int) -> str:
        """ "warmup" before the first refresh, "first" at it, "steady" from then on."""
        if clock == self.first_refresh:
            return "first"
        return "warmup" if clock < self.first_refresh else "steady"

    def period(self, clock: int) -> int:
        """The frequency at this clock."""
        every = self.precondition_frequency
        return every if isinstance(every, int) else every(clock)

    @property
    def last_period(self) -> int:
        """The period in the end."""
        return self.period(THE_END)

    def due(self, clock: int, phase: int) -> bool:
        """At the first refresh, and then when the clock is at the matrix's phase of the period."""
        if clock <= self.first_refresh:
            return clock == self.first_refresh
        return clock % self.period(clock) == phase

    def refresh_cost(self, m: int, n: int) -> float:
        """Cubic in each side that has a factor."""
        return float(sum(d**3 for d in (m, n) if d <= self.max_precond_dim))
