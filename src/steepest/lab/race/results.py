"""The results of a race: what its records say in numbers, one result per entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from steepest.lab.race.race import Entry, Plan, Runs
from steepest.lab.race.trial import Record, Run
from steepest.lab.shared.contenders import Contender


@dataclass(frozen=True)
class StepCount:
    """A number of steps, or an upper bound on it."""

    steps: float
    bound: str = ""
    """``≤`` if the true number is smaller, because the first sample or a longer run's schedule gave it."""

    def __str__(self) -> str:
        return f"{self.bound}{self.steps:.0f}"


@dataclass(frozen=True)
class Result:
    """The result of one entry: its best setting, what it reached, and what that took."""

    entry: Entry
    best: Contender
    runs: tuple[Run, ...]
    """Runs of the best setting over the whole distance, by seed."""
    finals: tuple[float, ...]
    """Their final losses."""
    settings_tried: int
    runs_diverged: int
    """Runs of any setting that diverged."""
    best_at_edge_of: tuple[str, ...]
    """Settings whose best value is the lowest or highest that was tried, so that the optimum may lie beyond it."""
    steps_to_target: StepCount | None
    """None if the target was not reached."""
    steps_share: float | None
    """The steps to the target, as a share of the baseline's."""
    time_share: float | None
    """The time of model and optimizer to the target, as a share of the baseline's."""
    model_ms: float
    """Median over the runs of all entries, since the model is the same; the mean of its own in a race over time, and
    where the optimizer works during the model's passes or makes some itself."""
    optimizer_ms: float
    """Mean over steps."""
    optimizer_ms_p50: float
    optimizer_ms_p95: float
    state_bytes_per_parameter: float
    optimizer_peak_bytes: int
    own_passes: bool
    """Whether the optimizer works during the model's passes or makes some itself."""
    gradients_poisoned: int
    updates_skipped: int | None
    """Updates that the optimizer skipped because of poisoned gradients; None if it does not count them."""

    @property
    def label(self) -> str:
        """The entry's label."""
        return self.entry.label

    @property
    def final(self) -> float:
        """Mean of the final losses over seeds; infinite if one run diverged."""
        return fmean(self.finals)

    @property
    def bound(self) -> str:
        """``≤`` if the steps to the target are an upper bound."""
        return self.steps_to_target.bound if self.steps_to_target else ""

    @property
    def half_range(self) -> float:
        """Half the range of the final losses over seeds."""
        return (max(self.finals) - min(self.finals)) / 2 if math.isfinite(self.final) else math.nan

    def beats(self, other: Result) -> bool:
        """Whether every seed ended below every seed of the other entry."""
        return max(self.finals) < min(other.finals)


@dataclass(frozen=True)
class Results:
    """The results of all entries, ordered by final loss."""

    runs: Runs
    entries: tuple[Result, ...]
    target: float | None
    """The baseline's mean final loss; None if it has none."""
    clock: str
    """What times are: "CPU time", or "time" on an accelerator."""

    @property
    def plan(self) -> Plan:
        """What the race was to run."""
        return self.runs.plan

    @property
    def baseline(self) -> Result | None:
        """The result to beat."""
        return next((result for result in self.entries if result.entry == self.plan.baseline), None)

    @property
    def noise(self) -> float:
        """The largest range over seeds; smaller differences between entries mean nothing."""
        return max((2 * result.half_range for result in self.entries if math.isfinite(result.final)), default=math.nan)


def find_results(runs: Runs) -> Results:
    """Return the results of the runs so far."""
    plan = runs.plan
    best = {entry.label: runs.best(entry) for entry in plan.entries}
    base = best[plan.baseline.label]
    base_runs = [] if base is None else runs.of(base)
    loss = _mean_final(base_runs) if base_runs else math.inf
    target = loss if math.isfinite(loss) else None
    plain = [run for run in runs.finished if not run.record.own_passes]
    shared_ms = median(_milliseconds(plain, lambda record: record.model_seconds))
    base_ms = _model_ms(base_runs, shared_ms) + fmean(_milliseconds(base_runs, lambda record: record.optimizer_seconds))
    base_steps = fmean(_steps(base_runs)) if base_runs else math.nan

    def result(entry: Entry, contender: Contender) -> Result:
        own = runs.of(contender)
        records = [run.record for run in own]
        milliseconds = _milliseconds(own, lambda record: record.optimizer_seconds)
        model_ms = _model_ms(own, shared_ms)
        count = None
        if target is not None:
            count = StepCount(base_steps) if contender == base else steps_to(target, runs, contender)
        share = count.steps / base_steps if count else None
        skipped = [record.skipped for record in records if record.skipped is not None]
        return Result(
            entry=entry,
            best=contender,
            runs=tuple(own),
            finals=tuple(record.final for record in records),
            settings_tried=len(entry.candidates),
            runs_diverged=sum(run.record.status == "diverged" for c in entry.candidates for run in runs.of(c)),
            best_at_edge_of=_edges(entry, contender),
            steps_to_target=count,
            steps_share=share,
            time_share=share * (model_ms + fmean(milliseconds)) / base_ms if share else None,
            model_ms=model_ms,
            optimizer_ms=fmean(milliseconds),
            optimizer_ms_p50=median(milliseconds),
            optimizer_ms_p95=quantiles(milliseconds, n=20)[-1] if len(milliseconds) > 1 else milliseconds[0],
            state_bytes_per_parameter=max(record.state_bytes / record.parameters for record in records),
            optimizer_peak_bytes=max(record.peak_memory for record in records),
            own_passes=any(record.own_passes for record in records),
            gradients_poisoned=sum(record.poisoned for record in records),
            updates_skipped=sum(skipped) if len(skipped) == len(records) else None,
        )

    found = [result(entry, contender) for entry in plan.entries if (contender := best[entry.label]) is not None]
    clock = runs.finished[0].record.clock if runs.finished else "time"
    return Results(runs, tuple(sorted(found, key=lambda result: result.final)), target, clock)


def steps_to(target: float, runs: Runs, contender: Contender) -> StepCount | None:
    """Return how many steps the contender needs to the target loss.

    With runs over several distances, between these, since the learning rate of each had come down. Otherwise, at the
    first crossing within the whole run, which is an upper bound.
    """
    distances = (*runs.plan.shorter, runs.plan.steps)
    finals = [(steps, _mean_final(found)) for steps in distances if (found := runs.of(contender, steps))]
    if len(finals) > 1:
        return crossing(target, finals)
    count = crossing(target, mean_validation(runs.of(contender)))
    return StepCount(count.steps, "≤") if count else None


def crossing(target: float, points: Sequence[tuple[float, float]]) -> StepCount | None:
    """Return where a curve through ``(steps, loss)`` first comes down to the target.

    >>> crossing(2.0, [(100, 3.0), (200, 1.0)])
    StepCount(steps=150.0, bound='')
    >>> str(crossing(2.0, [(100, 1.5), (200, 1.0)])), crossing(2.0, [(100, 3.0)])
    ('≤100', None)
    """
    before: tuple[float, float] | None = None
    for steps, loss in points:
        if loss <= target:
            if before is None or not math.isfinite(before[1]):
                return StepCount(steps, "≤")
            return StepCount(before[0] + (steps - before[0]) * (before[1] - target) / (before[1] - loss))
        before = steps, loss
    return None


def mean_validation(runs: Iterable[Run]) -> list[tuple[float, float]]:
    """Return the validation curve, averaged over the seeds that got as far; in a race over time, its steps as well."""
    curves = [run.record.validation for run in runs]
    columns = [[curve[i] for curve in curves if i < len(curve)] for i in range(max(map(len, curves), default=0))]
    return [(fmean(step for step, _ in column), fmean(loss for _, loss in column)) for column in columns]


def _mean_final(runs: list[Run]) -> float:
    return fmean(run.record.final for run in runs)


def _steps(runs: Iterable[Run]) -> list[int]:
    """Return how many steps each run took, which differ in a race over time."""
    return [len(run.record.model_seconds) for run in runs]


def _model_ms(runs: Sequence[Run], shared: float) -> float:
    """Return the model's time of a step: ``shared``, or the mean of these runs where that is something of their own."""
    if not any(run.record.own_passes or run.trial.seconds for run in runs):
        return shared
    return fmean(_milliseconds(runs, lambda record: record.model_seconds))


def _milliseconds(runs: Iterable[Run], seconds: Callable[[Record], list[float]]) -> list[float]:
    """Return the times of all steps of all runs; NaN if there is none."""
    return [1e3 * s for run in runs for s in seconds(run.record)] or [math.nan]


def _edges(entry: Entry, best: Contender) -> tuple[str, ...]:
    """Return the settings of which three or more numbers were tried and the lowest or highest was best."""
    edges = []
    for name in entry.tuned:
        tried = {value for c in entry.candidates if isinstance(value := c.value(name), int | float)}
        if len(tried) > 2 and best.value(name) in (min(tried), max(tried)):
            edges.append(name)
    return tuple(edges)
