"""The search: the suite's walk over settings for one optimizer on one workload, trial by trial."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from steepest.lab.race.pool import Pool
from steepest.lab.race.store import Store
from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.errors import BadInput
from steepest.lab.suite import protocol
from steepest.lab.suite.log import Row
from steepest.lab.suite.protocol import Tried


@dataclass
class Search:
    """What is to be tried, and what was tried so far."""

    workload: str
    """What the processes of trials load it by."""
    start: Contender
    steps: int
    trials: int
    """Most settings to try."""
    budget: float = math.inf
    """CPU seconds to spend, those of an earlier call included."""
    tried: list[Tried] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """What is kept of the run of each setting."""

    @property
    def next_setting(self) -> Contender | None:
        """The setting to try next; None if the search is complete."""
        return protocol.next_setting(self.start, [trial.loss for trial in self.tried], self.trials)

    @property
    def best(self) -> Tried | None:
        """The trial with the lowest loss; None if all diverged."""
        best = protocol.best_of(self.tried)
        return best if math.isfinite(best.loss) else None

    def run(self, pool: Pool, store: Store) -> None:
        """Try settings until the search is complete, or the next one would exceed the budget.

        What was tried is valid if an exception ends it.

        Raises:
            BadInput: if the first trial fails; later ones count as diverged, as in the suite.
        """

        def ended(trial: Trial, outcome: Record | str) -> None:
            pool.bars.ended(trial, outcome)
            if isinstance(outcome, Record):
                store.save(Run(trial, outcome))
            elif not self.tried:
                raise BadInput(f"{trial}: {outcome}")
            take(trial, outcome)

        def take(trial: Trial, outcome: Record | str) -> None:
            self.rows.append(Row.of(self.workload, trial, outcome))
            self.tried.append(Tried(trial.contender, self.rows[-1].loss))

        while (setting := self.next_setting) is not None:
            trial = Trial(self.workload, setting, self.steps, seed=0)
            if (known := store.find(trial)) is not None:
                take(trial, known.record)
            elif self._fits():
                pool.run([trial], ended)
            else:
                return

    def _fits(self) -> bool:
        """Return whether the budget has room for a trial that takes what the others took in the mean."""
        spent = sum(row.cpu_seconds for row in self.rows)
        return not self.rows or spent * (1 + 1 / len(self.rows)) <= self.budget
