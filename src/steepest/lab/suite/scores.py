"""The scores of a suite: for each contender, what its cells say in the geometric mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from steepest.lab.shared.contenders import Contender
from steepest.lab.suite.suite import Cell, Column, Suite


@dataclass(frozen=True)
class Score:
    """What a contender reached in one column. Ratios are shares of the baseline's; less is better."""

    contender: Contender
    column: Column
    cells: tuple[Cell, ...]
    """By workload, in the order of the suite."""

    @property
    def label(self) -> str:
        """The contender's label."""
        return self.contender.label

    @property
    def steps(self) -> float | None:
        """Geometric mean of the steps to the baseline's final loss; None without a workload where it has one."""
        return geometric_mean(self._steps())

    @property
    def time(self) -> float | None:
        """The same of the time of model and optimizer."""
        return geometric_mean(cell.time for cell in self.cells if cell.time is not None)

    @property
    def worst(self) -> float | None:
        """The largest number of steps on any workload."""
        return max(self._steps(), default=None)

    @property
    def compared(self) -> int:
        """How many workloads the means are over."""
        return len(self._steps())

    @property
    def bounded(self) -> bool:
        """Whether a mean has a workload in it where steps are a bound only."""
        return any(cell.steps.bound for cell in self.cells if cell.steps is not None)

    def _steps(self) -> list[float]:
        return [cell.steps.value for cell in self.cells if cell.steps is not None]


def scores(suite: Suite, column: Column) -> list[Score]:
    """Return the scores of all contenders that have a complete cell.

    Those over all workloads come first, since means over others can't be compared; among them, the fewest steps.
    """
    found = []
    for contender in suite.contenders:
        cells = [suite.cell(task, contender, column) for task in suite.tasks_of(contender)]
        if complete := tuple(cell for cell in cells if cell is not None):
            found.append(Score(contender, column, complete))
    return sorted(found, key=lambda s: (s.compared < len(suite.tasks), math.inf if s.steps is None else s.steps))


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean; None of nothing.

    >>> geometric_mean([0.5, 2.0]), geometric_mean([]) is None
    (1.0, True)
    """
    logarithms = [math.log(value) for value in values]
    return math.exp(fmean(logarithms)) if logarithms else None
