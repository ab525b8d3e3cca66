"""The report of a bench: one HTML file with step times by phase. Its text is in report.html."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from steepest.engine.phases import PHASES, REST
from steepest.lab.bench import text
from steepest.lab.shared.charts import COLOURS, FAINT, GREY, blank
from steepest.lab.shared.report import render

FLOOR = "#d9483b"
"""The colour of the floor."""
BAR, MARGIN = 26, 90
"""The height of a contender's bar and of the margins, in pixels."""
FACTS = ("command", "versions", "machine", "device", "threads", "load")


def page(content: dict[str, Any]) -> str:
    """Return the report as HTML, from what the JSON holds."""
    facts = {name: content[name] for name in FACTS}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return render("bench/report.html", content=content, facts=facts, text=text, stacked=stacked)


def stacked(found: Sequence[text.Row], clock: str) -> go.Figure:
    """Draw step times by phase as stacked bars, with a mark at each contender's floor. A peer's step is one bar."""
    done = [one for one in reversed(found) if not one["error"]]
    names = [one["contender"] for one in done]
    figure = blank("milliseconds of a step")
    figure.update_layout(
        height=MARGIN + BAR * len(done),
        barmode="stack",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        xaxis={"rangemode": "tozero"},
    )
    parts = {
        name: [one["phases_ms"].get(name, 0.0) if one["ours"] else 0.0 for one in done] for name in (*PHASES, REST)
    }
    parts["a peer's step"] = [0.0 if one["ours"] else one[clock]["mean"] for one in done]
    for (name, values), colour in zip(parts.items(), (*COLOURS[: len(PHASES)], GREY, FAINT), strict=True):
        if any(values):
            hover = f"%{{y}}<br>{name}: %{{x:.3g}} ms<extra></extra>"
            figure.add_bar(x=values, y=names, orientation="h", name=name, marker_color=colour, hovertemplate=hover)
    figure.add_scatter(
        x=[one["floor_ms"] for one in done],
        y=names,
        mode="markers",
        name="floor",
        marker={"symbol": "line-ns", "size": 18, "line": {"color": FLOOR, "width": 3}},
        hovertemplate="%{y}<br>floor: %{x:.3g} ms<extra></extra>",
    )
    return figure
