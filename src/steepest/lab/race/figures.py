"""The figures of the report, each drawn from records and findings alone. A contender keeps its colour throughout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from statistics import fmean, geometric_mean

import plotly.graph_objects as go

from steepest.lab.race.race import Entry, Plan, Results
from steepest.lab.race.results import Finding, Findings
from steepest.lab.race.text import loss
from steepest.lab.race.trial import Record, Run
from steepest.lab.shared.charts import COLOURS, GREY, Points, blank, curve, faded, log_axis

BINS = 60


def colours(plan: Plan) -> dict[str, str]:
    """Each entry's colour, by label, told apart on white and on black; the baseline is grey."""
    others = [entry.label for entry in plan.entries if entry != plan.baseline]
    return {plan.baseline.label: GREY} | {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}


def loss_over_steps(findings: Findings, results: Results) -> go.Figure:
    """Validation loss at each look, with the range over seeds."""
    figure = blank("steps")
    _loss_curves(figure, findings, results, lambda run: [float(step) for step, _ in run.record.validation])
    return figure


def loss_over_time(findings: Findings, results: Results) -> go.Figure:
    """The same looks, at the time that they had taken."""

    def seconds(run: Run) -> list[float]:
        times = zip(run.record.model_seconds, run.record.optimizer_seconds, strict=False)
        total = list(accumulate(model + optimizer for model, optimizer in times))
        return [total[step - 1] for step, _ in run.record.validation]

    figure = blank(f"seconds of {findings.clock}, model and optimizer")
    _loss_curves(figure, findings, results, seconds)
    return figure


def share_of_steps(findings: Findings) -> go.Figure:
    """Steps to the target, as a share of the baseline's."""
    return _share_bars(findings, lambda line: [line.steps_share], lambda line: f"{line.reach} steps")


def share_of_time(findings: Findings) -> go.Figure:
    """Time to the target, as a share of the baseline's: the model's part and the optimizer's."""

    def parts(line: Finding) -> list[float | None]:
        optimizer = line.optimizer_ms / (line.model_ms + line.optimizer_ms)
        return [None if line.time_share is None else line.time_share * part for part in (1 - optimizer, optimizer)]

    def seconds(line: Finding) -> str:
        assert line.reach is not None  # only then is there a bar
        return f"{line.reach.bound}{line.reach.steps * (line.model_ms + line.optimizer_ms) / 1e3:.1f} s"

    return _share_bars(findings, parts, seconds)


def rate_curves(findings: Findings, results: Results) -> go.Figure | None:
    """Final loss against learning rate, if anybody tried several: the best of each rate, and where it diverged."""
    figure = blank("learning rate of the hidden matrices")
    paint = colours(findings.plan)
    swept = [entry for entry in findings.plan.entries if len({c.lr for c in entry.candidates}) > 1]
    curves = {entry.label: _best_by_rate(entry, results) for entry in swept}
    finite = [loss for curve in curves.values() for _, losses in curve for loss in losses if math.isfinite(loss)]
    if not finite:
        return None
    ceiling = max(finite) + 0.08 * (max(finite) - min(finite))
    for label, by_rate in curves.items():
        kept = [(rate, losses) for rate, losses in by_rate if math.isfinite(fmean(losses))]
        low, high, mean = ([(rate, pick(losses)) for rate, losses in kept] for pick in (min, max, fmean))
        best = min((loss for _, loss in mean), default=math.inf)
        _band(figure, label, paint[label], low, high)
        curve(figure, label, paint[label], mean, "lines+markers", [13 if loss == best else 7 for _, loss in mean])
        lost = [rate for rate, losses in by_rate if not math.isfinite(fmean(losses))]
        figure.add_scatter(
            x=lost,
            y=[ceiling] * len(lost),
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": paint[label]},
            name=label,
            legendgroup=label,
            hovertemplate=f"{label} diverged at %{{x:g}}<extra></extra>",
        )
    _target_line(figure, findings)
    rates = sorted({rate for curve in curves.values() for rate, _ in curve})
    figure.update_xaxes(type="log", tickvals=rates, ticktext=[f"{rate:g}" for rate in rates])
    return figure


def loss_by_distance(findings: Findings, results: Results) -> go.Figure | None:
    """Final loss of runs over several distances, if there were any; where a line meets the target, read its steps."""
    plan, paint = findings.plan, colours(findings.plan)
    if not plan.shorter:
        return None
    figure = blank("steps of the whole run")
    for line in findings.lines:
        runs = [(steps, results.of(line.best, steps)) for steps in (*plan.shorter, plan.steps)]
        finals = [(steps, [run.record.final for run in those]) for steps, those in runs if those]
        finals = [(steps, losses) for steps, losses in finals if math.isfinite(fmean(losses))]
        low, high = ([(float(s), pick(ls)) for s, ls in finals] for pick in (min, max))
        _band(figure, line.label, paint[line.label], low, high)
        curve(figure, line.label, paint[line.label], [(float(s), fmean(ls)) for s, ls in finals], mode="lines+markers")
    _target_line(figure, findings, named=False)
    return figure


def step_times(findings: Findings, results: Results) -> go.Figure:
    """How long the optimizer's part of a step takes: one histogram for each contender, on one scale."""
    figure = blank("milliseconds of one optimizer step")
    paint = colours(findings.plan)
    times = {
        line.label: [1e3 * s for run in results.of(line.best) for s in run.record.optimizer_seconds if s > 0]
        for line in findings.lines
    }
    everything = sorted(ms for series in times.values() for ms in series) or [1.0]
    low, high = everything[0] * 0.8, everything[-1] * 1.2
    edges = [low * (high / low) ** (i / BINS) for i in range(BINS + 1)]
    for row, (label, series) in enumerate(reversed(times.items())):
        counts = [0] * BINS
        for ms in series:
            counts[min(BINS - 1, int(BINS * math.log(ms / low) / math.log(high / low)))] += 1
        tallest = max(counts) or 1
        heights = [0.62 * math.sqrt(count / tallest) for count in counts]  # roots, so that rare slow steps can be seen
        xs = [edge for a, b in pairwise(edges) for edge in (a, b)]
        figure.add_scatter(
            x=[edges[0], *xs, edges[-1]],
            y=[row, *(row + height for height in heights for _ in range(2)), row],
            mode="lines",
            line={"color": paint[label], "width": 1.5},
            fill="toself",
            fillcolor=faded(paint[label], 0.35),
            name=label,
            legendgroup=label,
            hoverinfo="skip",
        )
        _row_label(figure, label, row + 0.76)
    log_axis(figure.update_xaxes, [low, high])
    figure.update_yaxes(visible=False, range=[-0.1, len(times)])
    figure.update_layout(height=70 + _row_height(len(times)) * len(times))
    return figure


def update_sizes(findings: Findings, results: Results) -> go.Figure:
    """Root mean square of updates, in learning rates: the median matrix, and the one that moves furthest, dotted."""
    figure = blank("steps")
    for line in findings.lines:
        runs = results.of(line.best)
        colour = colours(findings.plan)[line.label]
        curve(figure, line.label, colour, _averaged(runs, lambda r: [(s, median) for s, median, _ in r.update_rms]))
        furthest = _averaged(runs, lambda r: [(s, most) for s, _, most in r.update_rms])
        curve(figure, line.label, colour, furthest, dash="dot", width=1.2)
    log_axis(figure.update_xaxes, [x for trace in figure.data for x in trace.x])
    log_axis(figure.update_yaxes, [y for trace in figure.data for y in trace.y])
    return figure


def spectra(
    findings: Findings, results: Results, series: Callable[[Record], Iterable[tuple[float, float]]]
) -> go.Figure | None:
    """A sampled series for each contender that has it, on a logarithmic scale if it spans one; None if nobody has."""
    figure = blank("steps")
    for line in findings.lines:
        points = _averaged(results.of(line.best), series)
        if points:
            curve(figure, line.label, colours(findings.plan)[line.label], points, mode="lines+markers")
    values = [y for trace in figure.data for y in trace.y]
    if values and max(values) > 10 * min(values):
        log_axis(figure.update_yaxes, values)
    return figure if figure.data else None


def _loss_curves(
    figure: go.Figure, findings: Findings, results: Results, position: Callable[[Run], Sequence[float]]
) -> None:
    """Each best setting's validation losses: the mean over seeds, and their range behind it."""
    paint, tops, bottoms = colours(findings.plan), [], []
    for line in findings.lines:
        runs = results.of(line.best)
        looks = min((len(run.record.validation) for run in runs), default=0)
        xs = [fmean(position(run)[i] for run in runs) for i in range(looks)]
        losses = [[run.record.validation[i][1] for run in runs] for i in range(looks)]
        if not looks:
            continue
        low, high = ([(x, pick(ls)) for x, ls in zip(xs, losses, strict=True)] for pick in (min, max))
        _band(figure, line.label, paint[line.label], low, high)
        curve(figure, line.label, paint[line.label], [(x, fmean(ls)) for x, ls in zip(xs, losses, strict=True)])
        bottoms.append(min(loss for _, loss in low))
        if line.final < math.inf:
            tops.append(fmean(losses[min(looks - 1, looks // 5)]))
    if tops:  # the first drop is everybody's; what comes after it tells them apart
        margin = 0.04 * (max(tops) - min(bottoms))
        figure.update_yaxes(range=[min(bottoms) - margin, max(tops) + margin])
    _target_line(figure, findings)


def _share_bars(
    findings: Findings, parts: Callable[[Finding], Sequence[float | None]], words: Callable[[Finding], str]
) -> go.Figure:
    """Horizontal bars, the shortest on top, each with its label above and its number behind; upper bounds hatched."""
    figure = blank("")
    paint = colours(findings.plan)
    order = sorted(findings.lines, key=lambda line: sum(p if p is not None else math.inf for p in parts(line)))
    for row, line in enumerate(reversed(order)):
        _row_label(figure, line.label, row + 0.42)
        total = 0.0
        if line.reach is None:
            _note_at(figure, 0.0, row, "not reached")
            continue
        for shade, part in zip((1.0, 0.45), parts(line), strict=False):
            total += part or 0.0
            figure.add_bar(
                x=[part],
                y=[row],
                orientation="h",
                width=0.42,
                name=line.label,
                legendgroup=line.label,
                marker={
                    "color": faded(paint[line.label], shade),
                    "pattern": {
                        "shape": "/" if line.reach.bound else "",
                        "fillmode": "overlay",
                        "fgcolor": "rgba(255, 255, 255, 0.5)",
                        "size": 7,
                    },
                },
                hoverinfo="skip",
            )
        _note_at(figure, total, row, f"<b>{line.reach.bound}{total:.2f}</b>  {words(line)}")
    figure.add_vline(x=1, line={"color": GREY, "width": 1, "dash": "dash"})
    longest = max((sum(p or 0.0 for p in parts(line)) for line in order), default=1.0)
    figure.update_xaxes(range=[0, 1.5 * max(1.0, longest)], tickvals=[0, 0.25, 0.5, 0.75, 1], showgrid=False)
    figure.update_yaxes(visible=False, range=[-0.4, len(order) - 0.3])
    figure.update_layout(barmode="stack", height=40 + _row_height(len(order)) * len(order))
    return figure


def _band(figure: go.Figure, label: str, colour: str, low: Points, high: Points) -> None:
    """The range over seeds."""
    around = [*high, *reversed(low)]
    figure.add_scatter(
        x=[x for x, _ in around],
        y=[y for _, y in around],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=faded(colour, 0.2),
        name=label,
        legendgroup=label,
        hoverinfo="skip",
    )


def _target_line(figure: go.Figure, findings: Findings, named: bool = True) -> None:
    if findings.target is not None:
        text = f"{findings.plan.baseline.label}'s {loss(findings.target)}" if named else ""
        figure.add_hline(
            y=findings.target,
            line={"color": GREY, "width": 1, "dash": "dash"},
            annotation={"text": text, "font": {"size": 11}},
            annotation_position="bottom left",
        )


def _row_height(rows: int) -> int:
    """Of figures with a row for each contender, in pixels: many stand closer together."""
    return 60 if rows <= 6 else 46


def _row_label(figure: go.Figure, label: str, y: float) -> None:
    """A contender's name, at the left over its row: beside it, a long one would leave no room on a phone."""
    figure.add_annotation(x=0, xref="paper", y=y, text=label, showarrow=False, xanchor="left", font={"size": 12})


def _note_at(figure: go.Figure, x: float, y: float, text: str) -> None:
    figure.add_annotation(x=x, y=y, text=text, showarrow=False, xanchor="left", xshift=6, font={"size": 12})


def _averaged(runs: Sequence[Run], series: Callable[[Record], Iterable[tuple[float, float]]]) -> Points:
    """The geometric mean over seeds at each step."""
    by_step: dict[float, list[float]] = {}
    for run in runs:
        for step, value in series(run.record):
            if value > 0:
                by_step.setdefault(step, []).append(value)
    return [(step, geometric_mean(values)) for step, values in sorted(by_step.items())]


def _best_by_rate(entry: Entry, results: Results) -> list[tuple[float, list[float]]]:
    """For each learning rate the final losses, over seeds, of the best setting that has it."""
    by_rate: dict[float, list[float]] = {}
    for candidate in entry.candidates:
        losses = [run.record.final for run in results.of(candidate)]
        if losses and fmean(losses) <= fmean(by_rate.get(candidate.lr, [math.inf])):
            by_rate[candidate.lr] = losses
    return sorted(by_rate.items())
