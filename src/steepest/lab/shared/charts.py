"""Charts: the empty figure that every chart of a report starts from, and its curves, areas and colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import plotly.graph_objects as go

GREY = "#7d8799"
COLOURS = (
    *("#2f7de1", "#f0842c", "#12a48b", "#d6478f", "#8a5cf0", "#d9483b", "#98990f"),
    *("#0aa5c9", "#a5704a", "#5b6ee1", "#3f9b3a", "#c98a00", "#b04fc4", "#6b7f2a"),
)
"""Colours that can be told apart on white and on black."""
LOGARITHMIC = {"type": "log", "tickformat": ",.7~g"}
"""An axis on which numbers are written out, where plotly would write their first digit only."""
FAINT = "rgba(128, 134, 150, 0.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

Points = list[tuple[float, float]]
Samples = Sequence[tuple[float, Sequence[float]]]
"""Positions, and at each the losses of all seeds."""


def blank(x_title: str) -> go.Figure:
    """Return an empty figure; the report's style sheet colours its text."""
    figure = go.Figure()
    axis = {"gridcolor": FAINT, "zeroline": False, "automargin": True, "linecolor": FAINT, "tickcolor": FAINT}
    figure.update_layout(
        template="none",
        height=340,
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hovermode="closest",
        dragmode=False,
        font={"family": FONT, "size": 12},
        xaxis={**axis, "title": {"text": x_title, "standoff": 8}},
        yaxis=axis,
    )
    return figure


def curve(
    figure: go.Figure, label: str, colour: str, points: Points, mode: str = "lines", **style: str | float
) -> None:
    """Draw a curve, which the button of its label hides and shows."""
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode=mode,
        line={"color": colour, "width": 2.2, **style},
        name=label,
        legendgroup=label,
        hovertemplate=f"{label}<br>%{{y:.4g}} at %{{x:.4g}}<extra></extra>",
    )


def area(figure: go.Figure, label: str, colour: str, outline: Points) -> None:
    """Fill the area inside an outline, which the button of its label hides and shows."""
    figure.add_scatter(
        x=[x for x, _ in outline],
        y=[y for _, y in outline],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=f"{colour}33",  # a fifth of the colour,
        name=label,
        legendgroup=label,
        hoverinfo="skip",
    )


def mean_and_range(figure: go.Figure, label: str, colour: str, samples: Samples, mode: str = "lines") -> None:
    """Draw the mean over seeds as a curve, and the range behind it as a band."""
    low, high, mean = ([(x, pick(losses)) for x, losses in samples] for pick in (min, max, fmean))
    area(figure, label, colour, [*high, *reversed(low)])
    curve(figure, label, colour, mean, mode)


def final_losses(x_title: str, samples: Mapping[str, Samples], colours: Mapping[str, str]) -> go.Figure | None:
    """Draw final losses by label, with crosses at the top where a run diverged; None if no loss is finite."""
    finite = [x for found in samples.values() for _, losses in found for x in losses if math.isfinite(x)]
    if not finite:
        return None
    figure = blank(x_title)
    ceiling = max(finite) + 0.08 * (max(finite) - min(finite))
    for label, found in samples.items():
        if not found:
            continue
        kept = [(x, losses) for x, losses in found if math.isfinite(fmean(losses))]
        mean_and_range(figure, label, colours[label], kept, "lines+markers")
        diverged = [x for x, losses in found if not math.isfinite(fmean(losses))]
        figure.add_scatter(
            x=diverged,
            y=[ceiling] * len(diverged),
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": colours[label]},
            name=label,
            legendgroup=label,
            hovertemplate=f"{label} diverged at %{{x:g}}<extra></extra>",
        )
    positions = sorted({x for found in samples.values() for x, _ in found})
    figure.update_xaxes(type="log", tickvals=positions, ticktext=[f"{x:g}" for x in positions])
    return figure
