"""Suites that are run on paper: a function says how each trial ends."""

import math
from collections.abc import Callable

from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import preset
from steepest.lab.suite.log import Row
from steepest.lab.suite.suite import COLUMNS, Suite, Task

STEPS = 100
Ending = Callable[[str, Trial], float]


def made_up(*contenders: str, workloads: tuple[str, ...] = ("one", "two")) -> Suite:
    """A suite in which nothing was run yet."""
    tasks = tuple(Task(name, name, STEPS, f"of {name}", "validation loss") for name in workloads)
    return Suite(tasks, tuple(map(preset, ("adamw", *contenders))))


def loss(workload: str, trial: Trial, best: float = 2.0, speed: float = 1.0) -> float:
    """A loss that falls with the length, lowest at ``best`` times the preset's rate; seeds are 0.01 apart."""
    rate = trial.contender.lr / preset(trial.contender.label).lr / best
    return 3 - 0.5 * math.log2(speed * trial.steps / STEPS) + 0.1 * math.log2(rate) ** 2 + 0.01 * trial.seed


def record(final: float, steps: int, optimizer_ms: float = 1.0) -> Record:
    """The record of a run with this final loss; an infinite one has diverged."""
    finite = math.isfinite(final)
    return Record(
        status="finished" if finite else "diverged",
        model_seconds=[3e-3] * steps,
        optimizer_seconds=[optimizer_ms / 1e3] * steps,
        validation=[(steps, final)] if finite else [],
        parameters=1,
        cpu_seconds=steps / 10,
    )


def run_on_paper(suite: Suite, ending: Ending = loss) -> list[tuple[str, Trial]]:
    """Run the whole suite, and return its trials in order."""
    ran = []
    for contender in suite.contenders:
        for column in COLUMNS:
            while missing := suite.missing(contender, column):
                for task, trial in missing:
                    milliseconds = 1.0 if trial.contender.label == "adamw" else 3.0
                    suite.log.add(Row.of(task.name, trial, record(ending(task.name, trial), trial.steps, milliseconds)))
                    ran.append((task.name, trial))
    return ran
