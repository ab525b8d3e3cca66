"""Rules with something slow in them, bases or inverse roots, which is refreshed every few steps.

`Refreshing` says when that happens; a rule says how, in three methods:

    update_factors(G, factors, step)    takes the gradient into the covariances, at every step
    update_bases(factors, slots, step)  refreshes what is computed from them, for the matrices that are due
    direction(G, factors, step)         is the step's direction, in the bases that there are

"before" runs them in this order, so that the current gradient is in the basis that projects it. "after" takes the
direction first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, final

from torch import Tensor

from steepest.linalg.precision import fp32_matmul_precision
from steepest.rule.intervals import intervals, steps_between
from steepest.rule.options import at_least, frequency, lays_out, one_of
from steepest.rule.rule import Rule, Slots, State, Step
from steepest.rule.words import BasisTiming, Precision

Factors = TypeVar("Factors")


BASES = ("Q_", "P_")
"""How the names of bases and of roots begin."""


def revive(state: State) -> None:
    """Make bases and roots that are zero the identity again, in place, as somebody may have zeroed all of the state."""
    for name, Q in state.items():
        if name.startswith(BASES):
            dead = Q.abs().amax(dim=(-2, -1)) == 0  # [B]
            Q.diagonal(dim1=-2, dim2=-1).add_(dead.unsqueeze(-1))


THE_END = 10**9
"""A clock at which every schedule of refresh frequencies has reached its last value."""


@dataclass(frozen=True, kw_only=True)
class Refreshing(Rule, ABC, Generic[Factors]):
    """A rule that refreshes bases or roots of Kronecker factors every ``precondition_frequency`` steps.

    Each matrix counts its own updates, its ``clock``. Its first refresh comes at the clock ``first_refresh`` (0 unless
    the rule warms up), whatever the frequency. If that is a function, a refresh is due as soon as so many steps as it
    gives for the clock have passed since the last refresh.
    """

    precondition_frequency: int | Callable[[int], int] = frequency(1)
    max_precond_dim: int = lays_out(at_least(0, 8192))
    fp32_matmul_prec: Precision = one_of(Precision, "highest")

    @abstractmethod
    def factors(self, state: State, step: Step) -> Factors:
        """The covariances and bases in a stack's state, as the three methods below take them."""

    @abstractmethod
    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        """Take the gradient ``G [B, m, n]`` into the factors, in place."""

    @abstractmethod
    def update_bases(self, factors: Factors, slots: Slots, step: Step) -> None:
        """Refresh the bases or roots of these slots, and turn whatever stands in their coordinates along."""

    @abstractmethod
    def direction(self, G: Tensor, factors: Factors, step: Step) -> Tensor:
        """The direction ``[B, m, n]``, in the bases that there are."""

    @final
    def keeps(self, name: str, step: Step) -> bool:
        """Between refreshes: bases and roots, which only refreshes change, and averages."""
        between = step.stage == "steady" and step.refresh is None
        return between and (name.startswith(BASES) or name in self.averages)

    # When: a rule that leaves a choice declares an option of the same name.

    @property
    def basis_timing(self) -> BasisTiming:
        """Whether factors and bases take the gradient in before or after the direction is computed."""
        return "before"

    @property
    def adam_warmup_steps(self) -> int:
        """How many steps the rule takes without bases."""
        return 0

    @property
    def refresh_async(self) -> bool:
        """Whether refreshes are deferred until the weights have moved."""
        return False

    @property
    def settle(self) -> int:
        """The number of first updates at which a matrix refreshes whatever the frequency."""
        return 0

    @property
    def qr_fp32_matmul_prec(self) -> Precision:
        """The precision of products in a refresh."""
        return self.fp32_matmul_prec

    @final
    def update(self, G: Tensor, state: State, step: Step) -> Tensor | None:
        """Update factors, refresh what is due, and return the direction; None if the gradient only seeds the basis."""
        if step.stage != "steady" or step.refresh is not None:
            revive(state)
        factors, D = self.factors(state, step), None
        with fp32_matmul_precision(self.fp32_matmul_prec):
            if self.basis_timing == "after" and not (step.stage == "first" and self.seeds):
                D = self.direction(G, factors, step)
            self.update_factors(G, factors, step)
            if step.refresh is not None and not self.defers(step):
                with fp32_matmul_precision(self.qr_fp32_matmul_prec):
                    self.update_bases(factors, step.refresh, step)
            return self.direction(G, factors, step) if self.basis_timing == "before" else D

    @final
    def defers(self, step: Step) -> bool:
        """Whether the refresh of this step is left for `finish`."""
        return self.refresh_async and step.refresh is not None and step.stage != "first"

    @final
    def finish(self, state: State, step: Step) -> None:
        """Do the refresh that `update` has deferred."""
        assert step.refresh is not None
        with fp32_matmul_precision(self.qr_fp32_matmul_prec):
            self.update_bases(self.factors(state, step), step.refresh, step)

    @property
    def seeds(self) -> bool:
        """Whether a matrix's first gradient only seeds its basis and moves nothing, as SOAP's authors run it."""
        return self.basis_timing == "after" and self.adam_warmup_steps == 0

    @property
    def decay_follows(self) -> bool:
        """Whether weights decay after the step."""
        return self.basis_timing == "after"

    @property
    def first_refresh(self) -> int:
        """The clock of a matrix's first refresh: the end of the warm-up, before or after that step."""
        return self.adam_warmup_steps if self.basis_timing == "before" else max(self.adam_warmup_steps - 1, 0)

    @final
    def stage(self, clock: int) -> str:
        """ "warmup" before the first refresh, "first" at it, "steady" from then on."""
        if clock == self.first_refresh:
            return "first"
        return "warmup" if clock < self.first_refresh else "steady"

    @final
    def has_bases(self, step: Step) -> bool:
        """Whether the direction of this step is taken in bases, and not yet or still without."""
        return step.stage == "steady" or (step.stage == "first" and self.basis_timing == "before")

    @final
    def period(self, clock: int) -> int:
        """The number of steps between refreshes, at this clock."""
        every = self.precondition_frequency
        return steps_between(every, clock) if callable(every) else int(every)

    @property
    def last_period(self) -> int:
        """The period that a schedule ends with."""
        return self.period(THE_END)

    @final
    def due(self, clock: int, offset: float) -> bool:
        """At the first refresh, and then where the clock passes the matrix's offset in the interval between refreshes.

        Raises:
            ValueError: if ``precondition_frequency`` gives nonsense for this clock or an earlier one.
        """
        if clock <= self.first_refresh:
            return clock == self.first_refresh
        if clock < self.settle:
            return True
        every = self.precondition_frequency
        if callable(every):
            return intervals(every, self.first_refresh).passes(clock, offset)
        return clock % int(every) == round(offset * every) % int(every)

    def refresh_cost(self, m: int, n: int) -> float:
        """The relative cost of a refresh: cubic in each side that has a factor."""
        return float(sum(d**3 for d in (m, n) if d <= self.max_precond_dim))
