"""What a suite still has to run, and what its cells say, as functions of the log.

Every question replays the protocol from its beginning, with the log for an answer to each trial. So a suite that was
killed, or that goes on elsewhere, takes the same decisions again and runs nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, mode
from typing import Literal, NamedTuple

from steepest.lab.race.trial import Trial
from steepest.lab.shared.contenders import Contender
from steepest.lab.suite import protocol
from steepest.lab.suite.log import Log, Row, key
from steepest.lab.suite.protocol import Ratio, Tried

Column = Literal["tuned", "one_setting"]
COLUMNS: tuple[Column, ...] = ("tuned", "one_setting")
"""Settings tuned per workload, and one setting for all workloads."""
Losses = Mapping[float, tuple[float, ...]]
"""Final losses by seed, for each length as a share of the workload's."""


@dataclass(frozen=True)
class Task:
    """A workload in a suite."""

    name: str
    """Its name in the results."""
    spec: str
    """What the processes of the trials load it by."""
    steps: int
    fingerprint: str
    measure: str


class Chosen(NamedTuple):
    """A contender's setting."""

    contender: Contender
    edges: tuple[str, ...]
    """Settings whose best value may lie beyond what was tried; none where it was chosen for all workloads."""


class Finals(NamedTuple):
    """Final losses of a setting on a task over lengths, and the trials that give them."""

    losses: Losses
    trials: list[Trial]
    complete: bool
    """Whether all trials were run; otherwise there may be more."""


@dataclass(frozen=True)
class Cell:
    """What a contender reached on a workload, with the setting of one column."""

    task: Task
    contender: Contender
    losses: Losses
    edges: tuple[str, ...]
    target: float
    """The baseline's mean final loss; infinite if one of its runs diverged."""
    steps: Ratio | None
    """Steps to the baseline's final loss as a share of the baseline's; None if the baseline has none."""
    step_time: float | None
    """Time of a step of model and optimizer as a share of the baseline's."""
    significant: bool
    """Whether the final loss differs from the baseline's by more than luck."""
    same_time: float | None
    """The baseline's final loss if it trains for the same time; None where that is none of the lengths it ran."""
    is_baseline: bool

    @property
    def time(self) -> float | None:
        """Time to the baseline's final loss as a share of the baseline's."""
        return None if self.steps is None or self.step_time is None else self.steps.value * self.step_time

    @property
    def better(self) -> bool:
        """Whether the final loss is lower than the baseline's by more than luck."""
        return self.significant and self.final < self.target

    @property
    def worse(self) -> bool:
        """Whether the final loss is higher than the baseline's by more than luck."""
        return self.significant and self.final > self.target

    @property
    def final(self) -> float:
        """The mean final loss over seeds after the whole length."""
        return fmean(self.losses[1.0])


@dataclass
class Suite:
    """Contenders, the first of which is the baseline, and tasks, with what was run so far."""

    tasks: tuple[Task, ...]
    contenders: tuple[Contender, ...]
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By contender's label and task's name, why the one can't train the other."""
    log: Log = field(default_factory=Log)
    _chosen: dict[tuple[str, str, str], Chosen] = field(default_factory=dict)
    """Settings that are known; the log only grows, so they stay what they are."""

    @property
    def baseline(self) -> Contender:
        """The contender with which all are compared."""
        return self.contenders[0]

    def tasks_of(self, contender: Contender) -> list[Task]:
        """Return the tasks that the contender can train."""
        return [task for task in self.tasks if (contender.label, task.name) not in self.refused]

    def needs(self, contender: Contender, column: Column) -> list[tuple[Task, Trial]]:
        """Return the trials that a column of a contender rests on, as far as they are known, whether run or not.

        The baseline must be complete before: others have its final losses for targets.
        """
        found: list[tuple[Task, Trial]] = []
        for task in self.tasks_of(contender):
            tried, further = self.tuning(task, contender)
            found += [(task, self._trial(task, setting)) for setting in (*(t.contender for t in tried), *further)]
        if column == "one_setting":
            found += [(task, self._trial(task, setting)) for task, setting in self.choice(contender)[1]]
        for task in self.tasks_of(contender):
            if (chosen := self.setting(task, contender, column)) is not None:
                found += [(task, trial) for trial in self.finals(task, chosen.contender, column).trials]
        return found

    def missing(self, contender: Contender, column: Column) -> list[tuple[Task, Trial]]:
        """Return those of `needs` that were not run, each once."""
        trials = self._by_key(contender, column).values()
        return [(task, trial) for task, trial in trials if self.log.find(task.name, trial) is None]

    def _by_key(self, contender: Contender, column: Column) -> dict[str, tuple[Task, Trial]]:
        """Return what a column needs by what decides its result."""
        return {
            key(task.name, trial.contender.settings(), trial.steps, trial.seed): (task, trial)
            for task, trial in self.needs(contender, column)
        }

    def cost(self, contender: Contender, column: Column) -> float:
        """Return the CPU seconds of the runs that a column of a contender rests on, and no earlier column of it."""
        trials = self._by_key(contender, column)
        if column == "one_setting":
            for name in self._by_key(contender, "tuned"):
                trials.pop(name, None)
        rows = [self.log.find(task.name, trial) for task, trial in trials.values()]
        return sum(row.cpu_seconds for row in rows if row is not None)

    def tuning(self, task: Task, start: Contender) -> tuple[list[Tried], list[Contender]]:
        """Return what a contender has tried on a task, and the setting to try next, if any."""
        tried: list[Tried] = []
        while (setting := protocol.next_setting(start, [trial.loss for trial in tried])) is not None:
            if (row := self.log.find(task.name, self._trial(task, setting))) is None:
                return tried, [setting]
            tried.append(Tried(setting, row.loss))
        return tried, []

    def choice(self, start: Contender) -> tuple[Contender | None, list[tuple[Task, Contender]]]:
        """Return the contender's one setting for all tasks, or None and the trials to run before it is known."""
        tasks = {task.name: task for task in self.tasks_of(start)}
        by_rate: dict[float, Contender] = {}
        for task in tasks.values():
            tried, further = self.tuning(task, start)
            if further:
                return None, []
            count = protocol.rates_only([trial.loss for trial in tried])
            by_rate |= {trial.contender.lr: trial.contender for trial in tried[:count]}
        settings = [by_rate[rate] for rate in sorted(by_rate)]
        best, missing = protocol.choose([self._lengths(setting, tasks.values()) for setting in settings], list(tasks))
        return None if missing else settings[best], [(tasks[name], settings[best]) for name in missing]

    def setting(self, task: Task, contender: Contender, column: Column) -> Chosen | None:
        """Return the contender's setting on a task; None if it is not known yet."""
        key = task.name, contender.label, column
        if key not in self._chosen:
            if column == "one_setting":
                choice, _ = self.choice(contender)
                found = None if choice is None else Chosen(choice, ())
            else:
                tried, further = self.tuning(task, contender)
                found = None if further else Chosen(protocol.best_of(tried).contender, protocol.edges(tried))
            if found is None:
                return None
            self._chosen[key] = found
        return self._chosen[key]

    def finals(self, task: Task, setting: Contender, column: Column) -> Finals:
        """Return the final losses of a setting over lengths, and the trials that give them."""
        found = Finals({}, [], complete=True)
        if self._is_baseline(setting):
            for share in protocol.BASELINE_LENGTHS:
                found = self._and_length(found, task, setting, share)
            return found
        target = self.target(task, column)
        while found.complete and (next_share := protocol.next_length(_means(found.losses), target)) is not None:
            found = self._and_length(found, task, setting, next_share)
        return found

    def _and_length(self, found: Finals, task: Task, setting: Contender, share: float) -> Finals:
        """Return the final losses with those of one more length."""
        trials = [self._trial(task, setting, share, seed) for seed in range(protocol.SEEDS)]
        rows = [row for trial in trials if (row := self.log.find(task.name, trial)) is not None]
        complete = len(rows) == len(trials)
        more = {share: tuple(row.loss for row in rows)} if complete else {}
        return Finals(
            dict(sorted({**found.losses, **more}.items())), [*found.trials, *trials], found.complete and complete
        )

    def target(self, task: Task, column: Column) -> float:
        """Return the baseline's mean final loss in a column; the baseline is complete."""
        chosen = self.setting(task, self.baseline, column)
        assert chosen is not None, "the baseline comes first"
        return fmean(self.finals(task, chosen.contender, column).losses[1.0])

    def cell(self, task: Task, contender: Contender, column: Column) -> Cell | None:
        """Return what a contender reached on a task; None until all that it takes was run."""
        base = self.setting(task, self.baseline, column)
        chosen = self.setting(task, contender, column)
        if base is None or chosen is None:
            return None
        theirs = self.finals(task, base.contender, column)
        if not theirs.complete:
            return None
        ours = self.finals(task, chosen.contender, column)
        if not ours.complete:
            return None
        target = fmean(theirs.losses[1.0])
        ratio: Ratio | None = None
        if math.isfinite(target):
            ratio = Ratio(1.0) if self._is_baseline(contender) else protocol.steps_ratio(_means(ours.losses), target)
        step_time = self._step_time(task, ours.trials, theirs.trials)
        return Cell(
            task=task,
            contender=chosen.contender,
            losses=ours.losses,
            edges=chosen.edges,
            target=target,
            steps=ratio,
            step_time=step_time,
            significant=protocol.significant(ours.losses[1.0], theirs.losses[1.0]),
            same_time=None if step_time is None else protocol.loss_at(_means(theirs.losses), step_time),
            is_baseline=self._is_baseline(contender),
        )

    def _step_time(self, task: Task, trials: Sequence[Trial], base: Sequence[Trial]) -> float | None:
        """Return the time of a step of these trials as a share of the baseline's, on one machine if any ran both."""
        ours, theirs = self._timed(task, trials), self._timed(task, base)
        if shared := [row.machine for row in ours if row.machine in {other.machine for other in theirs}]:
            ours, theirs = ([row for row in rows if row.machine == mode(shared)] for rows in (ours, theirs))
        if not ours or not theirs:
            return None
        if any(row.own_passes for row in ours):
            return median(map(_milliseconds, ours)) / median(map(_milliseconds, theirs))
        # The model's steps cost the same in all runs, so those of a run are the measure of its optimizer's steps: what
        # else the machine does at that time slows down both.
        return _relative(ours) / _relative(theirs)

    def _timed(self, task: Task, trials: Iterable[Trial]) -> list[Row]:
        """Return the rows of trials that have times."""
        rows = [self.log.find(task.name, trial) for trial in trials]
        return [row for row in rows if row is not None and math.isfinite(_milliseconds(row))]

    def _lengths(self, setting: Contender, tasks: Iterable[Task]) -> dict[str, float]:
        """Return the lengths that the tuned baseline needs for a setting's losses on the tasks on which it was run."""
        found = {}
        for task in tasks:
            if (row := self.log.find(task.name, self._trial(task, setting))) is not None:
                base = self.setting(task, self.baseline, "tuned")
                assert base is not None, "the baseline comes first"
                curve = _means(self.finals(task, base.contender, "tuned").losses)
                found[task.name] = protocol.equivalent_length(curve, row.loss)
        return found

    def _is_baseline(self, contender: Contender) -> bool:
        return contender.label == self.baseline.label

    def _trial(self, task: Task, setting: Contender, share: float = 1.0, seed: int = 0) -> Trial:
        return Trial(task.spec, setting, max(1, round(task.steps * share)), seed)


def _means(losses: Losses) -> dict[float, float]:
    return {share: fmean(values) for share, values in losses.items()}


def _milliseconds(row: Row) -> float:
    """Return the time of a step."""
    return row.model_ms + row.optimizer_ms


def _relative(rows: Iterable[Row]) -> float:
    """Return the time of a step in units of the model's time."""
    return median(_milliseconds(row) / row.model_ms for row in rows)
