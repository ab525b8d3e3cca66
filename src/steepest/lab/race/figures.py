"""The charts of the report. A contender keeps its colour in all of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from statistics import fmean

import plotly.graph_objects as go

from steepest.lab.race.race import Entry, Runs
from steepest.lab.race.results import Result, Results
from steepest.lab.race.trial import Run, loss
from steepest.lab.shared.charts import COLOURS, GREY, LOGARITHMIC, Samples, blank, final_losses, mean_and_range

DECADES = 100.0
"""From this ratio of the losses on, their axis is logarithmic."""
DASHED = {"color": GREY, "width": 1, "dash": "dash"}


def colours(results: Results) -> dict[str, str]:
    """Return the colour of each entry that has a result, by label; the baseline is grey."""
    base = results.plan.baseline.label
    others = [entry.label for entry in results.plan.entries if entry.label != base]
    paint = {base: GREY} | dict(zip(others, cycle(COLOURS), strict=False))
    return {result.label: paint[result.label] for result in results.entries}


def loss_over_steps(results: Results) -> go.Figure:
    """Draw validation losses over steps, with their range over seeds."""
    return _loss_curves(results, "steps", lambda run: [float(step) for step, _ in run.record.validation])


def loss_over_time(results: Results) -> go.Figure:
    """Draw the same validation losses over the time that they took."""

    def seconds(run: Run) -> list[float]:
        total = list(accumulate(map(operator.add, run.record.model_seconds, run.record.optimizer_seconds)))
        return [total[step - 1] for step, _ in run.record.validation]

    return _loss_curves(results, f"seconds of {results.clock}, model and optimizer", seconds)


def share_of_steps(results: Results) -> go.Figure:
    """Draw the steps to the target, as a share of the baseline's."""
    base = results.plan.baseline.label
    return _share_bars(results, f"steps, divided by {base}'s", lambda result: result.steps_share)


def share_of_time(results: Results) -> go.Figure:
    """Draw the time of model and optimizer to the target, as a share of the baseline's."""
    base = results.plan.baseline.label
    return _share_bars(results, f"{results.clock}, divided by {base}'s", lambda result: result.time_share)


def loss_by_rate(results: Results) -> go.Figure | None:
    """Draw the best final loss at each learning rate; None if nobody tried several."""
    swept = [entry for entry in results.plan.entries if len({c.lr for c in entry.candidates}) > 1]
    samples = {entry.label: _best_by_rate(entry, results.runs) for entry in swept}
    return _final_losses(results, "learning rate of the hidden matrices", samples)


def loss_by_distance(results: Results) -> go.Figure | None:
    """Draw the final losses of runs over several distances; None if there is only one."""
    distances = (*results.plan.shorter, results.plan.steps) if results.plan.shorter else ()
    samples = {
        result.label: [
            (steps, [run.record.final for run in runs])
            for steps in distances
            if (runs := results.runs.of(result.best, steps))
        ]
        for result in results.entries
    }
    return _final_losses(results, "steps of the whole run", samples)


def step_times(results: Results) -> go.Figure:
    """Draw the distribution of optimizer steps' times for each contender, one above the other on one scale."""
    figure, order = blank("milliseconds of one optimizer step"), list(reversed(results.entries))
    for row, (label, colour, runs) in enumerate(_curves(results, order)):
        figure.add_box(
            x=[round(1e3 * s, 4) for run in runs for s in run.record.optimizer_seconds if s > 0],
            y0=row,
            orientation="h",
            width=0.4,
            boxpoints="outliers",
            marker={"color": colour, "size": 3},
            name=label,
            legendgroup=label,
        )
    figure.update_xaxes(LOGARITHMIC, nticks=3)  # 1, 2, 5, 10: there is no room for more on a phone
    _name_rows(figure, order)
    return figure


def _curves(results: Results, order: Iterable[Result] | None = None) -> Iterable[tuple[str, str, Sequence[Run]]]:
    """Yield label, colour and runs of each entry."""
    paint = colours(results)
    return ((result.label, paint[result.label], result.runs) for result in order or results.entries)


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
        mean_and_range(figure, label, colour, samples)
        bottoms.append(min(map(min, losses)))
        if all(math.isfinite(run.record.final) for run in runs):
            tops.append(fmean(losses[min(count - 1, count // 5)]))
    if tops:  # all contenders share the first drop; what comes after it distinguishes them
        low, high = min(bottoms), max(tops)
        if decades := 0 < DECADES * low < high:  # on a linear axis, all but one would lie on the floor
            low, high = math.log10(low), math.log10(high)
            figure.update_yaxes(LOGARITHMIC)
        margin = 0.04 * (high - low)
        figure.update_yaxes(range=[low - margin, high + margin])
        _target_line(figure, results, decades)
    return figure


def _final_losses(results: Results, x_title: str, samples: Mapping[str, Samples]) -> go.Figure | None:
    """Draw final losses by label, and the baseline's; None if no loss is finite."""
    figure = final_losses(x_title, samples, colours(results))
    if figure is not None:
        _target_line(figure, results)
    return figure


def _share_bars(results: Results, x_title: str, share: Callable[[Result], float | None]) -> go.Figure:
    """Draw horizontal bars, the shortest on top, with their length behind them; upper bounds are hatched."""
    figure, order = blank(x_title), sorted(results.entries, key=lambda result: share(result) or math.inf, reverse=True)
    paint, lengths = colours(results), [share(result) or 0.0 for result in order]
    for row, (result, length) in enumerate(zip(order, lengths, strict=True)):
        figure.add_bar(
            x=[length],
            y=[row],
            orientation="h",
            width=0.42,
            marker={"color": paint[result.label], "pattern": {"shape": "/" if result.bound else "", "size": 7}},
            text=f"{result.bound}{length:.2f}" if length else "not reached",
            textposition="outside",
            name=result.label,
            legendgroup=result.label,
            hoverinfo="skip",
        )
    figure.add_vline(x=1, line=DASHED)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    figure.update_xaxes(range=[0, 1.3 * max(1.0, *lengths)], tickvals=ticks, showgrid=False)
    _name_rows(figure, order)
    return figure


def _target_line(figure: go.Figure, results: Results, logarithmic: bool = False) -> None:
    """Draw the baseline's final loss as a line."""
    if results.target is not None:
        text = f"{results.plan.baseline.label}'s {loss(results.target)}"
        figure.add_hline(results.target, line=DASHED)
        # On a logarithmic axis, plotly wants a line's height as it is, and an annotation's as a logarithm.
        y = math.log10(results.target) if logarithmic else results.target
        place = {"x": 0, "xref": "x domain", "xanchor": "left", "yanchor": "top", "showarrow": False}
        figure.add_annotation(y=y, text=text, font={"size": 11}, **place)


def _name_rows(figure: go.Figure, order: Sequence[Result]) -> None:
    """Write each contender's name above its row: beside it, a long one would leave no room on a phone."""
    for row, result in enumerate(order):
        figure.add_annotation(x=0, xref="paper", y=row + 0.42, text=result.label, showarrow=False, xanchor="left")
    figure.update_yaxes(visible=False, range=[-0.4, len(order) - 0.3])
    figure.update_layout(height=50 + 55 * len(order))


def _best_by_rate(entry: Entry, runs: Runs) -> list[tuple[float, list[float]]]:
    """Return for each learning rate the final losses, over seeds, of the best setting that has it."""
    by_rate: dict[float, list[float]] = {}
    for candidate in entry.candidates:
        losses = [run.record.final for run in runs.of(candidate)]
        if losses and fmean(losses) <= fmean(by_rate.get(candidate.lr, [math.inf])):
            by_rate[candidate.lr] = losses
    return sorted(by_rate.items())
