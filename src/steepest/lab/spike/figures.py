"""The figures of the spike study's report. Each solver keeps its colour at each precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from steepest.lab.shared.charts import COLOURS, GREY, blank, curve, log_axis
from steepest.lab.spike.measures import BOTH, Study, Trace
from steepest.lab.spike.study import FLOOR, GUARDS, SOLVERS

PATHS = [(solver, precision) for precision in BOTH for solver in SOLVERS]
PAINT = dict(zip(PATHS, ("#f0842c", "#d6478f", "#2f7de1", "#12a48b"), strict=True))
LEGEND = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
"""For curves that aren't a path's, which the page has no buttons for."""


def name(solver: str, precision: str) -> str:
    """What a path is called.

    >>> name("REKLS", "high")
    'REKLS, high'
    """
    return f"{solver}, {precision}"


def turned(study: Study, guard: str) -> go.Figure:
    """Angle of the leading eigenvectors to those before the spike, over steps."""
    return _angles(study, guard, "isotropic", lambda trace: trace.leading)


def from_truth(study: Study, guard: str) -> go.Figure:
    """Angle of the leading eigenvectors to those of the true covariance, over steps."""
    return _angles(study, guard, "directional", lambda trace: trace.to_truth)


def top_eigenvalue(study: Study, guard: str) -> go.Figure:
    """Of L, over all steps, logarithmic."""
    figure = _over_steps(study, guard, "isotropic", lambda trace: [values[0] for values in trace.eigenvalues], first=0)
    figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    return figure


def lost_quotients(study: Study, side: str) -> go.Figure:
    """How many Rayleigh quotients the absolute eps stands in for, over steps."""
    pick: dict[str, Callable[[Trace], Sequence[float]]] = {"L": lambda t: t.lost_left, "R": lambda t: t.lost_right}
    return _over_steps(study, "absolute", "isotropic", pick[side])


def update_sizes(study: Study, solver: str = "REKLS", precision: str = "highest") -> go.Figure:
    """Root mean square of updates under each guard, over steps."""
    figure = blank("step")
    start = _start(study)
    for colour, (guard, words) in zip((GREY, *COLOURS[4:6]), GUARDS.items(), strict=True):
        series = study.trace(solver, guard, precision).update_rms[start:]
        curve(figure, words, colour, [(start + 1.0 + i, value) for i, value in enumerate(series)])
    _mark_spike(figure, study)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=True, legend=LEGEND)
    return figure


def apart_by_floor(study: Study) -> go.Figure:
    """How far L is apart between the precisions after the spike, against the relative floor."""
    figure = blank("relative floor")
    points = sorted(study.floors.items())
    curve(figure, "REKLS", COLOURS[4], points, "lines+markers", [13 if x == FLOOR else 7 for x, _ in points])
    figure.update_xaxes(type="log", tickvals=[x for x, _ in points], ticktext=[f"{x:g}" for x, _ in points])
    log_axis(figure.update_yaxes, [y for _, y in points])
    return figure


def _angles(study: Study, guard: str, gradients: str, pick: Callable[[Trace], Sequence[float]]) -> go.Figure:
    figure = _over_steps(study, guard, gradients, pick)
    degrees = range(0, 91, 15)
    figure.update_yaxes(range=[-3, 93], tickvals=list(degrees), ticktext=[f"{x}°" for x in degrees])
    return figure


def _over_steps(
    study: Study, guard: str, gradients: str, pick: Callable[[Trace], Sequence[float]], first: int | None = None
) -> go.Figure:
    """A series of each path; where two lie on each other, both are seen."""
    figure = blank("step")
    first = _start(study) if first is None else first
    for (solver, precision), colour in PAINT.items():
        series = pick(study.trace(solver, guard, precision, gradients))
        points = [(i + 1.0, value) for i, value in enumerate(series)][first:]
        dash = "solid" if precision == "high" else "dash"
        curve(figure, name(solver, precision), colour, points, dash=dash, width=2.2 if solver == "REKLS" else 3.2)
    _mark_spike(figure, study)
    return figure


def _start(study: Study) -> int:
    """The first step that most figures show; what comes before is more of the same."""
    return max(study.setup.spike_at - 20, 0)


def _mark_spike(figure: go.Figure, study: Study) -> None:
    figure.add_vline(x=study.setup.spike_at + 1, line={"color": GREY, "width": 1, "dash": "dot"})
