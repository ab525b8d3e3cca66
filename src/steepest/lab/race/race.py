"""The race: which trials are run, and in which order.

First every entry's candidates run the whole distance, so each is tuned with as many trials as it has candidates. In a
full race they do so with one seed; then the best of each runs with all seeds, and shorter distances too, each with a
schedule of its own, because a long run half-way is no short run: its learning rate has not come down. Between those
distances the steps to a given loss are interpolated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

from steepest.lab.race.pool import Crew
from steepest.lab.race.store import Store
from steepest.lab.race.trial import Run, Trial
from steepest.lab.shared.contenders import Contender, grid
from steepest.lab.shared.presets import BASELINE

SHARES = (0.45, 0.5, 0.5667, 0.6667, 0.8)  # of the distance, for the shorter runs: from 135 to 240 of 300 steps


@dataclass(frozen=True)
class Entry:
    """A contender in the race: the settings that it tries."""

    label: str
    candidates: tuple[Contender, ...]

    @property
    def tuned(self) -> list[str]:
        """The settings of which several values are tried."""
        names = dict.fromkeys(name for c in self.candidates for name in (*c.options, "warmup", "elementwise"))
        return [name for name in names if any(c.value(name) != self.candidates[0].value(name) for c in self.candidates)]

    @classmethod
    def preset(cls, contender: Contender) -> Entry:
        """Just as it is."""
        return cls(contender.label, (contender,))

    @classmethod
    def swept(cls, contender: Contender, axes: dict[str, list[object]] | None = None) -> Entry:
        """Over the grid along ``axes``, or over its preset's learning rates."""
        if axes is None:
            axes = {"lr": list(contender.rates)}
        return cls(contender.label, tuple(grid(contender, axes)))


@dataclass(frozen=True)
class Plan:
    """What to run."""

    workload: str
    entries: tuple[Entry, ...]
    steps: int
    seeds: int
    shorter: tuple[int, ...] = ()
    """Further distances for the best of each entry."""
    poison: float = 0.0
    """Share of gradients that get entries that are not finite, in all trials."""

    @property
    def baseline(self) -> Entry:
        """The entry whose final loss is the target: AdamW, or else the first."""
        return next((e for e in self.entries if e.candidates[0].rule == BASELINE), self.entries[0])

    @property
    def tuning_seeds(self) -> int:
        """With how many seeds every candidate runs; where the best run again afterwards, one is enough to find them."""
        return 1 if self.shorter else self.seeds

    def tuning(self) -> list[Trial]:
        """Every candidate over the whole distance; a broken-off race has seen all entries, first seeds first."""
        most = max(len(entry.candidates) for entry in self.entries)
        return [
            Trial(self.workload, entry.candidates[i], self.steps, seed, self.poison)
            for seed in range(self.tuning_seeds)
            for i in range(most)
            for entry in self.entries
            if i < len(entry.candidates)
        ]

    def finals(self, best: Iterable[Contender]) -> list[Trial]:
        """What each entry's best candidate runs besides: the shorter distances, and the whole one with other seeds."""
        best = list(best)
        return [
            Trial(self.workload, contender, steps, seed, self.poison)
            for seed in range(self.seeds)
            for steps in (*self.shorter, *([self.steps] if seed >= self.tuning_seeds else []))
            for contender in best
        ]

    @property
    def total_trials(self) -> int:
        """How many there are."""
        tuning = sum(len(entry.candidates) for entry in self.entries) * self.tuning_seeds
        further = self.seeds * len(self.shorter) + self.seeds - self.tuning_seeds
        return tuning + len(self.entries) * further

    @property
    def total_steps(self) -> int:
        """Of all trials."""
        tuning = sum(len(entry.candidates) for entry in self.entries) * self.tuning_seeds * self.steps
        further = self.seeds * sum(self.shorter) + (self.seeds - self.tuning_seeds) * self.steps
        return tuning + len(self.entries) * further


def shorter_distances(steps: int) -> tuple[int, ...]:
    """The distances besides the whole one.

    >>> shorter_distances(300)
    (135, 150, 170, 200, 240)
    """
    return tuple(sorted({max(1, round(steps * share)) for share in SHARES} - {steps}))


@dataclass
class Results:
    """What has been run so far."""

    plan: Plan
    runs: list[Run] = field(default_factory=list)
    failures: list[tuple[Trial, str]] = field(default_factory=list)
    interrupted: bool = False

    def of(self, contender: Contender, steps: int | None = None) -> list[Run]:
        """The contender's runs over ``steps``, by default the whole distance."""
        steps = self.plan.steps if steps is None else steps
        chosen = (run for run in self.runs if run.trial.contender == contender and run.trial.steps == steps)
        return sorted(chosen, key=lambda run: run.trial.seed)

    def best(self, entry: Entry) -> Contender | None:
        """The candidate with the lowest mean loss over its seeds, of those with most of them run; None without runs."""
        tried = [candidate for candidate in entry.candidates if self.of(candidate)]
        if not tried:
            return None
        return min(tried, key=lambda c: (-len(self.of(c)), fmean(run.record.final for run in self.of(c))))


def race(plan: Plan, crew: Crew, store: Store, results: Results) -> None:
    """Run what isn't in the store yet. ``results`` grows as runs end, and is sound when an exception stops the race."""

    def run(trials: list[Trial]) -> None:
        missing = []
        for trial in trials:
            if (known := store.find(trial)) is not None:
                results.runs.append(known)
                crew.audience.skipped(trial)
            else:
                missing.append(trial)
        crew.run(missing, done, failed)

    def done(run: Run) -> None:
        store.save(run)
        results.runs.append(run)
        crew.audience.finished(run)

    def failed(trial: Trial, reason: str) -> None:
        results.failures.append((trial, reason))
        crew.audience.failed(trial, reason)

    run(plan.tuning())
    if plan.shorter:
        run(plan.finals(best for entry in plan.entries if (best := results.best(entry)) is not None))
