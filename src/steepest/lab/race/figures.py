"""The charts of the report. A contender keeps its colour in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from statistics import fmean, geometric_mean

import plotly.graph_objects as go

from steepest.lab.race.race import Entry, Runs
from steepest.lab.race.results import Result, Results
from steepest.lab.race.text import loss
from steepest.lab.race.trial import Record, Run
from steepest.lab.shared.charts import COLOURS, GREY, Points, area, blank, curve, faded, log_axis

BINS = 60
Samples = Sequence[tuple[float, Sequence[float]]]
"""Positions, and at each the losses of all seeds."""


def colours(results: Results) -> dict[str, str]:
    """Return the colour of each entry that has a result, by label; the baseline is grey."""
    base = results.plan.baseline.label
    others = [entry.label for entry in results.plan.entries if entry.label != base]
    paint = {base: GREY} | {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}
    return {result.label: paint[result.label] for result in results.entries}


def loss_over_steps(results: Results) -> go.Figure:
    """Draw validation losses over steps, with their range over seeds."""
    return _loss_curves(results, "steps", lambda run: [float(step) for step, _ in run.record.validation])


def loss_over_time(results: Results) -> go.Figure:
    """Draw the same validation losses over the time that they took."""

    def seconds(run: Run) -> list[float]:
        times = zip(run.record.model_seconds, run.record.optimizer_seconds, strict=False)
        total = list(accumulate(model + optimizer for model, optimizer in times))
        return [total[step - 1] for step, _ in run.record.validation]

    return _loss_curves(results, f"seconds of {results.clock}, model and optimizer", seconds)


def share_of_steps(results: Results) -> go.Figure:
    """Draw the steps to the target, as a share of the baseline's."""
    return _share_bars(results, lambda result: [result.steps_share], lambda result: f"{result.steps_to_target} steps")


def share_of_time(results: Results) -> go.Figure:
    """Draw the time to the target, as a share of the baseline's: the model's part and the optimizer's."""

    def parts(result: Result) -> list[float | None]:
        optimizer = result.optimizer_ms / (result.model_ms + result.optimizer_ms)
        return [None if result.time_share is None else result.time_share * part for part in (1 - optimizer, optimizer)]

    def seconds(result: Result) -> str:
        count = result.steps_to_target
        assert count is not None  # otherwise there is no bar
        return f"{count.bound}{count.steps * (result.model_ms + result.optimizer_ms) / 1e3:.1f} s"

    return _share_bars(results, parts, seconds)


def rate_curves(results: Results) -> go.Figure | None:
    """Draw the best final loss at each learning rate, with crosses where it diverged; None if nobody tried several."""
    swept = [entry for entry in results.plan.entries if len({c.lr for c in entry.candidates}) > 1]
    by_entry = {entry.label: _best_by_rate(entry, results.runs) for entry in swept}
    finite = [x for samples in by_entry.values() for _, losses in samples for x in losses if math.isfinite(x)]
    if not finite:
        return None
    figure, paint = blank("learning rate of the hidden matrices"), colours(results)
    ceiling = max(finite) + 0.08 * (max(finite) - min(finite))
    for label, samples in by_entry.items():
        if not samples:
            continue
        kept = [(rate, losses) for rate, losses in samples if math.isfinite(fmean(losses))]
        best = min((fmean(losses) for _, losses in kept), default=math.inf)
        sizes = [13 if fmean(losses) == best else 7 for _, losses in kept]
        _mean_and_range(figure, label, paint[label], kept, "lines+markers", sizes)
        diverged = [rate for rate, losses in samples if not math.isfinite(fmean(losses))]
        figure.add_scatter(
            x=diverged,
            y=[ceiling] * len(diverged),
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": paint[label]},
            name=label,
            legendgroup=label,
            hovertemplate=f"{label} diverged at %{{x:g}}<extra></extra>",
        )
    _target_line(figure, results)
    rates = sorted({rate for samples in by_entry.values() for rate, _ in samples})
    figure.update_xaxes(type="log", tickvals=rates, ticktext=[f"{rate:g}" for rate in rates])
    return figure


def loss_by_distance(results: Results) -> go.Figure | None:
    """Draw the final losses of runs over several distances; None if there is only one."""
    if not results.plan.shorter:
        return None
    figure, paint = blank("steps of the whole run"), colours(results)
    for result in results.entries:
        runs = [(steps, results.runs.of(result.best, steps)) for steps in (*results.plan.shorter, results.plan.steps)]
        samples = [(float(steps), [run.record.final for run in found]) for steps, found in runs if found]
        samples = [(steps, losses) for steps, losses in samples if math.isfinite(fmean(losses))]
        _mean_and_range(figure, result.label, paint[result.label], samples, "lines+markers")
    _target_line(figure, results, named=False)
    return figure


def step_times(results: Results) -> go.Figure:
    """Draw a histogram of the time of optimizer steps for each contender, one above the other on one scale."""
    figure, paint = blank("milliseconds of one optimizer step"), colours(results)
    times = {
        result.label: [1e3 * s for run in result.runs for s in run.record.optimizer_seconds if s > 0]
        for result in results.entries
    }
    everything = sorted(ms for series in times.values() for ms in series) or [1.0]
    low, high = everything[0] * 0.8, everything[-1] * 1.2
    edges = [low * (high / low) ** (i / BINS) for i in range(BINS + 1)]
    for row, (label, series) in enumerate(reversed(times.items())):
        counts = [0] * BINS
        for ms in series:
            counts[min(BINS - 1, int(BINS * math.log(ms / low) / math.log(high / low)))] += 1
        tallest = max(counts) or 1
        tops = [row + 0.62 * math.sqrt(count / tallest) for count in counts]  # square roots show rare slow steps
        bars = [(edge, top) for pair, top in zip(pairwise(edges), tops, strict=True) for edge in pair]
        area(figure, label, paint[label], [(low, row), *bars, (high, row)], opacity=0.35, line_width=1.5)
        _row_label(figure, label, row + 0.76)
    log_axis(figure.update_xaxes, [low, high])
    figure.update_yaxes(visible=False, range=[-0.1, len(times)])
    figure.update_layout(height=70 + _row_height(len(times)) * len(times))
    return figure


def update_sizes(results: Results) -> go.Figure:
    """Draw updates' root mean squares, in learning rates: the median matrix, and dotted the one with the largest."""
    figure = blank("steps")
    for label, colour, runs in _curves(results):
        curve(figure, label, colour, _averaged(runs, lambda r: [(step, median) for step, median, _ in r.update_rms]))
        largest = _averaged(runs, lambda r: [(step, most) for step, _, most in r.update_rms])
        curve(figure, label, colour, largest, dash="dot", width=1.2)
    log_axis(figure.update_xaxes, [x for trace in figure.data for x in trace.x])
    log_axis(figure.update_yaxes, [y for trace in figure.data for y in trace.y])
    return figure


def spectra(results: Results, series: Callable[[Record], Iterable[tuple[float, float]]]) -> go.Figure | None:
    """Draw a series of the record for each contender that has it; None if nobody has."""
    figure = blank("steps")
    for label, colour, runs in _curves(results):
        if points := _averaged(runs, series):
            curve(figure, label, colour, points, mode="lines+markers")
    values = [y for trace in figure.data for y in trace.y]
    if values and max(values) > 10 * min(values):
        log_axis(figure.update_yaxes, values)
    return figure if figure.data else None


def _curves(results: Results) -> Iterable[tuple[str, str, Sequence[Run]]]:
    """Yield label, colour and runs of each entry."""
    paint = colours(results)
    return ((result.label, paint[result.label], result.runs) for result in results.entries)


def _loss_curves(results: Results, x_title: str, position: Callable[[Run], Sequence[float]]) -> go.Figure:
    """Draw the validation losses of each best setting: the mean over seeds, and their range behind it."""
    figure, tops, bottoms = blank(x_title), [], []
    for label, colour, runs in _curves(results):
        count = min((len(run.record.validation) for run in runs), default=0)
        if not count:
            continue
        positions = [position(run) for run in runs]
        losses = [[run.record.validation[i][1] for run in runs] for i in range(count)]
        samples = [(fmean(xs[i] for xs in positions), losses[i]) for i in range(count)]
        _mean_and_range(figure, label, colour, samples)
        bottoms.append(min(map(min, losses)))
        if all(math.isfinite(run.record.final) for run in runs):
            tops.append(fmean(losses[min(count - 1, count // 5)]))
    if tops:  # all contenders share the first drop; what comes after it distinguishes them
        margin = 0.04 * (max(tops) - min(bottoms))
        figure.update_yaxes(range=[min(bottoms) - margin, max(tops) + margin])
    _target_line(figure, results)
    return figure


def _mean_and_range(
    figure: go.Figure, label: str, colour: str, samples: Samples, mode: str = "lines", sizes: Sequence[int] | int = 6
) -> None:
    """Draw the mean over seeds as a curve, and the range behind it as a band."""
    low, high, mean = ([(x, pick(losses)) for x, losses in samples] for pick in (min, max, fmean))
    area(figure, label, colour, [*high, *reversed(low)])
    curve(figure, label, colour, mean, mode, sizes)


def _share_bars(
    results: Results, parts: Callable[[Result], Sequence[float | None]], text: Callable[[Result], str]
) -> go.Figure:
    """Draw horizontal bars, the shortest on top, labelled above, with their number behind; upper bounds are hatched."""
    figure, paint = blank(""), colours(results)
    total = {result.label: sum(part or 0.0 for part in parts(result)) for result in results.entries}
    order = sorted(results.entries, key=lambda result: total[result.label] if result.steps_to_target else math.inf)
    for row, result in enumerate(reversed(order)):
        _row_label(figure, result.label, row + 0.42)
        if result.steps_to_target is None:
            _note_at(figure, 0.0, row, "not reached")
            continue
        bound = result.steps_to_target.bound
        hatched = {"shape": "/" if bound else "", "fillmode": "overlay", "fgcolor": "rgba(255, 255, 255, 0.5)"}
        for opacity, part in zip((1.0, 0.45), parts(result), strict=False):
            figure.add_bar(
                x=[part],
                y=[row],
                orientation="h",
                width=0.42,
                name=result.label,
                legendgroup=result.label,
                marker={"color": faded(paint[result.label], opacity), "pattern": {**hatched, "size": 7}},
                hoverinfo="skip",
            )
        length = total[result.label]
        _note_at(figure, length, row, f"<b>{bound}{length:.2f}</b>  {text(result)}")
    figure.add_vline(x=1, line={"color": GREY, "width": 1, "dash": "dash"})
    longest = max((1.0, *total.values()))
    figure.update_xaxes(range=[0, 1.5 * longest], tickvals=[0, 0.25, 0.5, 0.75, 1], showgrid=False)
    figure.update_yaxes(visible=False, range=[-0.4, len(order) - 0.3])
    figure.update_layout(barmode="stack", height=40 + _row_height(len(order)) * len(order))
    return figure


def _target_line(figure: go.Figure, results: Results, named: bool = True) -> None:
    if results.target is not None:
        text = f"{results.plan.baseline.label}'s {loss(results.target)}" if named else ""
        figure.add_hline(
            y=results.target,
            line={"color": GREY, "width": 1, "dash": "dash"},
            annotation={"text": text, "font": {"size": 11}},
            annotation_position="bottom left",
        )


def _row_height(rows: int) -> int:
    """Return the height in pixels of one of so many rows of a chart."""
    return 60 if rows <= 6 else 46


def _row_label(figure: go.Figure, label: str, y: float) -> None:
    """Write a contender's name above its row: beside it, a long one would leave no room on a phone."""
    figure.add_annotation(x=0, xref="paper", y=y, text=label, showarrow=False, xanchor="left", font={"size": 12})


def _note_at(figure: go.Figure, x: float, y: float, text: str) -> None:
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, xanchor="left", xshift=6, font={"size": 12})


def _averaged(runs: Sequence[Run], series: Callable[[Record], Iterable[tuple[float, float]]]) -> Points:
    """Return the geometric mean over seeds at each step."""
    by_step: dict[float, list[float]] = {}
    for run in runs:
        for step, value in series(run.record):
            if value > 0:
                by_step.setdefault(step, []).append(value)
    return [(step, geometric_mean(values)) for step, values in sorted(by_step.items())]


def _best_by_rate(entry: Entry, runs: Runs) -> list[tuple[float, list[float]]]:
    """Return for each learning rate the final losses, over seeds, of the best setting that has it."""
    by_rate: dict[float, list[float]] = {}
    for candidate in entry.candidates:
        losses = [run.record.final for run in runs.of(candidate)]
        if losses and fmean(losses) <= fmean(by_rate.get(candidate.lr, [math.inf])):
            by_rate[candidate.lr] = losses
    return sorted(by_rate.items())
