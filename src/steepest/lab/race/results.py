"""What the records say, in numbers: one line for each entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from steepest.lab.race.race import Entry, Plan, Results
from steepest.lab.race.trial import Run
from steepest.lab.shared.contenders import Contender


@dataclass(frozen=True)
class Reach:
    """How far it is to the target."""

    steps: float
    bound: str = ""
    """``≤`` where the true number is smaller: it was there at the first look, or the schedule was a longer run's."""

    def __str__(self) -> str:
        return f"{self.bound}{self.steps:.0f}"


@dataclass(frozen=True)
class Finding:
    """One entry's line."""

    entry: Entry
    best: Contender
    finals: tuple[float, ...]
    """Final loss of each seed of the best setting."""
    tried: int
    diverged: int
    """Runs that diverged, of any setting."""
    edges: tuple[str, ...]
    """Settings whose best value is the lowest or highest that was tried: the optimum may lie beyond."""
    reach: Reach | None
    """Steps to the target, if it was reached."""
    steps_share: float | None
    """The same, as a share of the baseline's."""
    time_share: float | None
    """Model and optimizer time to the target, as a share of the baseline's."""
    model_ms: float
    """Median over all entries, for the model is the same."""
    optimizer_ms: float
    """Mean of a step."""
    optimizer_p50: float
    optimizer_p95: float
    bytes_per_parameter: float
    peak_memory: int
    poisoned: int
    """Gradients that were given bad entries, in all runs of the best setting."""
    skipped: int | None
    """Updates that these have cost, by the optimizer's own count; None if it doesn't count."""

    @property
    def label(self) -> str:
        """The entry's."""
        return self.entry.label

    @property
    def final(self) -> float:
        """Mean over seeds; infinite if one diverged."""
        return fmean(self.finals)

    @property
    def spread(self) -> float:
        """Half the range over seeds."""
        return (max(self.finals) - min(self.finals)) / 2 if math.isfinite(self.final) else math.nan

    def beats(self, other: Finding) -> bool:
        """Whether every seed ended below every seed of the other."""
        return max(self.finals) < min(other.finals)


@dataclass(frozen=True)
class Findings:
    """All entries' lines, those with the lowest loss first."""

    plan: Plan
    lines: tuple[Finding, ...]
    target: float | None
    """The baseline's mean final loss."""
    clock: str
    """What times are: "CPU time", or plain "time" on an accelerator."""

    @property
    def baseline(self) -> Finding | None:
        """The line of the entry to beat."""
        return next((line for line in self.lines if line.entry == self.plan.baseline), None)

    @property
    def noise(self) -> float:
        """The largest range over seeds: smaller differences between entries say nothing."""
        return max((2 * line.spread for line in self.lines if math.isfinite(line.final)), default=math.nan)


def find(results: Results) -> Findings:
    """What the runs so far say."""
    plan = results.plan
    best = {entry.label: results.best(entry) for entry in plan.entries}
    base = best[plan.baseline.label]
    loss = _mean_final(results.of(base)) if base is not None else math.inf
    target = loss if math.isfinite(loss) else None
    model_ms = _model_ms(results)
    base_step = model_ms + _optimizer_ms(results.of(base)) if base is not None else math.nan

    lines = []
    for entry in plan.entries:
        contender = best[entry.label]
        if contender is None:
            continue
        runs = results.of(contender)
        milliseconds = [1e3 * s for run in runs for s in run.record.optimizer_seconds] or [math.nan]
        reach = None
        if target is not None:
            reach = Reach(plan.steps) if contender == base else steps_to(target, results, contender)
        share = reach.steps / plan.steps if reach else None
        lines.append(
            Finding(
                entry=entry,
                best=contender,
                finals=tuple(run.record.final for run in runs),
                tried=len(entry.candidates),
                diverged=sum(r.record.status == "diverged" for c in entry.candidates for r in results.of(c)),
                edges=_edges(entry, contender),
                reach=reach,
                steps_share=share,
                time_share=share * (model_ms + fmean(milliseconds)) / base_step if share else None,
                model_ms=model_ms,
                optimizer_ms=fmean(milliseconds),
                optimizer_p50=median(milliseconds),
                optimizer_p95=quantiles(milliseconds, n=20)[-1] if len(milliseconds) > 1 else milliseconds[0],
                bytes_per_parameter=max(r.record.state_bytes / r.record.parameters for r in runs),
                peak_memory=max(r.record.peak_memory for r in runs),
                poisoned=sum(r.record.poisoned for r in runs),
                skipped=_sum([r.record.skipped for r in runs]),
            )
        )
    clock = results.runs[0].record.clock if results.runs else "time"
    return Findings(plan, tuple(sorted(lines, key=lambda line: line.final)), target, clock)


def steps_to(target: float, results: Results, contender: Contender) -> Reach | None:
    """How many steps the contender needs to get to the target loss.

    With runs over several distances, between those: each had its learning rate come down. Without, from the first
    crossing within the whole run, which is an upper bound.
    """
    distances = (*results.plan.shorter, results.plan.steps)
    finals = [(steps, _mean_final(runs)) for steps in distances if (runs := results.of(contender, steps))]
    if len(finals) > 1:
        return crossing(target, finals)
    reach = crossing(target, mean_validation(results.of(contender)))
    return Reach(reach.steps, "≤") if reach else None


def crossing(target: float, points: list[tuple[int, float]]) -> Reach | None:
    """Where a curve through ``(steps, loss)`` first comes down to the target.

    >>> crossing(2.0, [(100, 3.0), (200, 1.0)])
    Reach(steps=150.0, bound='')
    >>> str(crossing(2.0, [(100, 1.5), (200, 1.0)])), crossing(2.0, [(100, 3.0)])
    ('≤100', None)
    """
    for i, (steps, loss) in enumerate(points):
        if loss <= target:
            if i == 0:
                return Reach(steps, "≤")
            steps_before, loss_before = points[i - 1]
            if not math.isfinite(loss_before):
                return Reach(steps, "≤")
            return Reach(steps_before + (steps - steps_before) * (loss_before - target) / (loss_before - loss))
    return None


def mean_validation(runs: list[Run]) -> list[tuple[int, float]]:
    """The validation curve, averaged over the seeds that got that far."""
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for step, loss in run.record.validation:
            by_step.setdefault(step, []).append(loss)
    return [(step, fmean(losses)) for step, losses in sorted(by_step.items())]


def _mean_final(runs: list[Run]) -> float:
    return fmean(run.record.final for run in runs)


def _model_ms(results: Results) -> float:
    """Median time of batch, forward and backward over all steps of all runs."""
    seconds = [s for run in results.runs for s in run.record.model_seconds]
    return 1e3 * median(seconds) if seconds else math.nan


def _optimizer_ms(runs: list[Run]) -> float:
    seconds = [s for run in runs for s in run.record.optimizer_seconds]
    return 1e3 * fmean(seconds) if seconds else math.nan


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _edges(entry: Entry, best: Contender) -> tuple[str, ...]:
    """The numeric settings of which three or more values were tried, and the best is the lowest or highest of them."""
    edges = []
    for name in entry.tuned:
        tried = {value for c in entry.candidates if isinstance(value := c.value(name), int | float)}
        if len(tried) > 2 and best.value(name) in (min(tried), max(tried)):
            edges.append(name)
    return tuple(edges)
