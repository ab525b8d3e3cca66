"""Running a suite: contender by contender, so that a stop at any time leaves a table of those that are complete."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from steepest.lab.race.pool import Pool
from steepest.lab.race.store import Store
from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.errors import BadInput
from steepest.lab.suite.log import Row
from steepest.lab.suite.suite import COLUMNS, Column, Suite, Task

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
Stage = tuple[Contender, Column]


def parse_budget(text: str) -> float:
    """Return the seconds of CPU time that a budget such as ``30m`` names.

    >>> parse_budget("90s"), parse_budget("30m"), parse_budget("2.5h")
    (90.0, 1800.0, 9000.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or not float(match[1]):
        raise BadInput(f"--budget {text}: write CPU time as 90s, 10m or 2h")
    return float(match[1]) * UNITS[match[2]]


class Runner:
    """Runs what a suite lacks.

    Args:
        suite: What is to be run; its log grows.
        pool: The processes.
        stores: The store of each task, by name, with the runs of an earlier call.
        budget: CPU time in seconds that runs may take, those in the stores included; None for as much as it needs.
        finished: Called after each stage.
    """

    def __init__(
        self,
        suite: Suite,
        pool: Pool,
        stores: Mapping[str, Store],
        budget: float | None,
        finished: Callable[[Contender, Column], None],
    ) -> None:
        self.suite, self.pool, self.stores = suite, pool, stores
        self.budget, self.finished = budget, finished
        self.spent = 0.0
        """CPU seconds of the runs of this call, and of those that it found in the stores."""
        self.left_out: list[Stage] = []
        """What the budget did not suffice for."""
        self._costs: dict[Column, list[float]] = {column: [] for column in COLUMNS}

    def run(self) -> None:
        """Run all stages. What is there is valid if an exception ends it."""
        for contender in self.suite.contenders:
            for column in COLUMNS:
                self._run_stage(contender, column)

    def _run_stage(self, contender: Contender, column: Column) -> None:
        """Run what a column of a contender needs, round by round, since each round's results decide on the next."""
        begun = False
        while wanted := self.suite.missing(contender, column):
            if not (rest := self._not_stored(wanted)):
                continue
            if not begun and not self._fits(contender, column):
                self.left_out.append((contender, column))
                return
            begun = True
            self._run_round(rest)
        self._costs[column].append(self.suite.cost(contender, column))
        self.finished(contender, column)

    def _fits(self, contender: Contender, column: Column) -> bool:
        """Return whether a stage is to be begun: it may take what that of earlier contenders took in the mean.

        Once one was left out, so are all that come later in the list. The baseline's are never left out.
        """
        if self.budget is None or contender is self.suite.baseline:
            return True
        expected = fmean(self._costs[column]) - self.suite.cost(contender, column)
        return not self.left_out and self.spent + max(0.0, expected) <= self.budget

    def _run_round(self, wanted: Sequence[tuple[Task, Trial]]) -> None:
        """Run these trials."""
        tasks = {id(trial): task for task, trial in wanted}

        def ended(trial: Trial, outcome: Record | str) -> None:
            task = tasks[id(trial)]
            if isinstance(outcome, Record):
                self.stores[task.name].save(Run(trial, outcome))
            self._take(task, trial, outcome)
            self.pool.bars.ended(trial, outcome)

        self.pool.run([trial for _, trial in wanted], ended)

    def _not_stored(self, wanted: Sequence[tuple[Task, Trial]]) -> list[tuple[Task, Trial]]:
        """Take what an earlier call has stored, and return the rest."""
        rest = []
        for task, trial in wanted:
            if (run := self.stores[task.name].find(trial)) is None:
                rest.append((task, trial))
            else:
                self._take(task, trial, run.record)
        return rest

    def _take(self, task: Task, trial: Trial, outcome: Record | str) -> None:
        row = Row.of(task.name, trial, outcome)
        self.suite.log.add(row)
        self.spent += row.cpu_seconds
