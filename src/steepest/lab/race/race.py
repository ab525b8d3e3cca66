"""The race decides which trials are run, and in which order.

First, all candidates of all entries run the whole distance, so that each entry is tuned with as many trials as it has
candidates. In a full race they do so with one seed. Then the best candidate of each entry runs with all seeds, and over
shorter distances too, each with a schedule of its own: a long run at half its steps is no short run, because its
learning rate has not come down. The steps to a given loss are interpolated between the distances.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from steepest.lab.race.pool import Pool
from steepest.lab.race.store import Store
from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.contenders import Contender, grid
from steepest.lab.shared.presets import BASELINE

SHARES = (0.45, 0.5, 0.5667, 0.6667, 0.8)
"""Lengths of the shorter runs, as shares of the distance: from 135 to 240 of 300 steps."""


@dataclass(frozen=True)
class Entry:
    """A contender in the race, with all settings that it tries."""

    label: str
    candidates: tuple[Contender, ...]

    @property
    def tuned(self) -> list[str]:
        """Names of the settings of which several values are tried."""
        names = dict.fromkeys(name for c in self.candidates for name in (*c.options, "warmup", "elementwise"))
        return [name for name in names if any(c.value(name) != self.candidates[0].value(name) for c in self.candidates)]

    @classmethod
    def of(cls, contender: Contender, axes: Mapping[str, Sequence[Any]]) -> Entry:
        """Return an entry that tries the grid along ``axes``; without axes, the contender's own settings."""
        return cls(contender.label, tuple(grid(contender, axes)) if axes else (contender,))


@dataclass(frozen=True)
class Plan:
    """The trials of a race."""

    workload: str
    entries: tuple[Entry, ...]
    steps: int
    seeds: int
    shorter: tuple[int, ...] = ()
    """Shorter distances that the best candidate of each entry runs, too."""
    poison: float = 0.0
    """Share of gradients that get NaN or infinite entries, in all trials."""
    seconds: float = 0.0
    """Time of model and optimizer that each trial has; 0 where it has ``steps`` instead, which otherwise are 0."""

    @property
    def baseline(self) -> Entry:
        """The entry whose final loss is the target: AdamW's, or else the first."""
        return next((e for e in self.entries if e.candidates[0].rule == BASELINE), self.entries[0])

    @property
    def tuning_seeds(self) -> int:
        """Seeds that every candidate runs: one where the best candidates run with the others afterwards."""
        return 1 if self.shorter else self.seeds

    def tuning(self) -> list[Trial]:
        """Return the trials of all candidates, ordered so that an interrupted race has seen all entries."""
        most = max(len(entry.candidates) for entry in self.entries)
        return [
            Trial(self.workload, entry.candidates[i], self.steps, seed, self.poison, self.seconds)
            for seed in range(self.tuning_seeds)
            for i in range(most)
            for entry in self.entries
            if i < len(entry.candidates)
        ]

    def finals(self, best: Iterable[Contender]) -> list[Trial]:
        """Return the further trials of the best candidates: shorter distances, and other seeds of the whole one."""
        best = list(best)
        return [
            Trial(self.workload, contender, steps, seed, self.poison, self.seconds)
            for seed in range(self.seeds)
            for steps in (*self.shorter, *([self.steps] if seed >= self.tuning_seeds else []))
            for contender in best
        ]

    @property
    def distances(self) -> list[float]:
        """Steps, or seconds, of each trial of the race, whatever candidates turn out best."""
        return [trial.length for trial in (*self.tuning(), *self.finals(e.candidates[0] for e in self.entries))]


def shorter_distances(steps: int) -> tuple[int, ...]:
    """Return the distances that a full race runs besides the whole one.

    >>> shorter_distances(300)
    (135, 150, 170, 200, 240)
    """
    return tuple(sorted({max(1, round(steps * share)) for share in SHARES} - {steps}))


@dataclass
class Runs:
    """All runs of a race so far."""

    plan: Plan
    finished: list[Run] = field(default_factory=list)
    failures: list[tuple[Trial, str]] = field(default_factory=list)
    interrupted: bool = False

    def of(self, contender: Contender, steps: int | None = None) -> list[Run]:
        """Return the contender's runs over ``steps``, by default the whole distance, ordered by seed."""
        steps = self.plan.steps if steps is None else steps
        chosen = (run for run in self.finished if run.trial.contender == contender and run.trial.steps == steps)
        return sorted(chosen, key=lambda run: run.trial.seed)

    def best(self, entry: Entry) -> Contender | None:
        """Return the candidate with the lowest mean loss, among those that ran with most seeds; None without runs."""
        tried = [candidate for candidate in entry.candidates if self.of(candidate)]
        if not tried:
            return None
        return min(tried, key=lambda c: (-len(self.of(c)), fmean(run.record.final for run in self.of(c))))


def race(plan: Plan, pool: Pool, store: Store, runs: Runs) -> None:
    """Run the trials that the store does not have. ``runs`` grows meanwhile, and is valid if an exception ends it."""

    def run(trials: list[Trial]) -> None:
        missing = []
        for trial in trials:
            if (known := store.find(trial)) is None:
                missing.append(trial)
            else:
                runs.finished.append(known)
                pool.bars.skipped(trial)
        pool.run(missing, ended)

    def ended(trial: Trial, outcome: Record | str) -> None:
        if isinstance(outcome, str):
            runs.failures.append((trial, outcome))
        else:
            run = Run(trial, outcome)
            store.save(run)
            runs.finished.append(run)
        pool.bars.ended(trial, outcome)

    run(plan.tuning())
    if plan.shorter:
        run(plan.finals(best for entry in plan.entries if (best := runs.best(entry)) is not None))
