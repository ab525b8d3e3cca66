"""Charts: the empty figure that every chart of a report starts from, and its curves, areas, axes and colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

GREY = "#7d8799"
COLOURS = (
    *("#2f7de1", "#f0842c", "#12a48b", "#d6478f", "#8a5cf0", "#d9483b", "#98990f"),
    *("#0aa5c9", "#a5704a", "#5b6ee1", "#3f9b3a", "#c98a00", "#b04fc4", "#6b7f2a"),
)
"""Colours that can be told apart on white and on black."""
FAINT = "rgba(128, 134, 150, 0.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

Points = list[tuple[float, float]]


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
    figure: go.Figure,
    label: str,
    colour: str,
    points: Points,
    mode: str = "lines",
    sizes: Sequence[int] | int = 6,
    **style: object,
) -> None:
    """Draw a curve, which the button of its label hides and shows."""
    figure.add_scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode=mode,
        line={"color": colour, "width": 2.2, **style},
        marker={"color": colour, "size": sizes},
        name=label,
        legendgroup=label,
        hovertemplate=f"{label}<br>%{{y:.4g}} at %{{x:.4g}}<extra></extra>",
    )


def area(
    figure: go.Figure, label: str, colour: str, outline: Points, opacity: float = 0.2, line_width: float = 0
) -> None:
    """Fill the area inside an outline, which the button of its label hides and shows."""
    figure.add_scatter(
        x=[x for x, _ in outline],
        y=[y for _, y in outline],
        mode="lines",
        line={"color": colour, "width": line_width},
        fill="toself",
        fillcolor=faded(colour, opacity),
        name=label,
        legendgroup=label,
        hoverinfo="skip",
    )


def log_axis(update: Callable[..., object], values: Sequence[float]) -> None:
    """Make an axis logarithmic, with few, round numbers on it."""
    if not values:
        return
    ticks = round_ticks(min(values) * 0.9, max(values) * 1.1)
    update(type="log", tickvals=ticks, ticktext=[f"{tick:,.7g}" for tick in ticks])


def round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from low to high: powers of ten if there are three, else with 2 and 5, else all digits.

    >>> round_ticks(0.8, 3000), round_ticks(0.8, 30), round_ticks(2.4, 4.7)
    ([1.0, 10.0, 100.0, 1000.0], [1.0, 2.0, 5.0, 10.0, 20.0], [3.0, 4.0])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        found = [tick for d in decades for k in digits if low <= (tick := k * 10.0**d) <= high]
        if len(found) >= 3:
            break
    return found


def faded(colour: str, opacity: float) -> str:
    """Return a hex colour that is partly transparent.

    >>> faded("#ff8000", 0.5)
    'rgba(255, 128, 0, 0.5)'
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"
