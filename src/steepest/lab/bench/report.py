"""The bench's report: one HTML file, with step times by phase against the least that they could be."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import plotly.graph_objects as go

from steepest.engine.phases import PHASES, REST
from steepest.lab.bench.text import FOOTNOTE, PHASES_NOTE, Row, Table, comparisons, failures, phases, times
from steepest.lab.shared.charts import COLOURS, FAINT, GREY, blank
from steepest.lab.shared.page import figure, render, row, section, table

INK = "#d9483b"
"""Of the floor."""
BAR, MARGIN = 26, 90
"""Pixels of height for each contender, and for what is around them."""


def page(content: dict[str, Any]) -> str:
    """The whole file, from what the JSON holds."""
    today = datetime.now(UTC).strftime("%d %B %Y")
    kicker = f"steepest bench · {content['device']} · {content['steps']} steps · {today}"
    body = [
        f'<header><p class="kicker">{escape(kicker)}</p><h1>What a step takes, and what it takes it for</h1></header>'
    ]
    for one in content["sets"]:
        body += _set(one, content["clock"])
    facts = {name: content[name] for name in ("command", "versions", "machine", "device", "threads", "load")}
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_fact(fact))}</dd>" for name, fact in facts.items())
    body.append(f"<h2>How to get this again</h2><dl>{pairs}</dl>")
    return render("steepest bench", body)


def stacked(found: Sequence[Row], clock: str) -> go.Figure:
    """Step times by phase, stacked; a mark at each contender's floor. Peers' steps are in one piece."""
    done = [one for one in reversed(found) if not one["error"]]
    drawn = _bars(len(done), "milliseconds of a step")
    for name, colour in zip((*PHASES, REST), (*COLOURS[: len(PHASES)], GREY), strict=True):
        values = [one["phases_ms"].get(name, 0.0) if one["ours"] else 0.0 for one in done]
        if any(values):
            _bar(drawn, name, colour, values, done)
    whole = [0.0 if one["ours"] else one[clock]["mean"] for one in done]
    if any(whole):
        _bar(drawn, "a peer's step", FAINT, whole, done)
    drawn.add_scatter(
        x=[one["floor_ms"]["sum"] for one in done],
        y=[one["contender"] for one in done],
        mode="markers",
        name="floor",
        marker={"symbol": "line-ns", "size": 18, "line": {"color": INK, "width": 3}},
        hovertemplate="%{y}<br>floor: %{x:.3g} ms<extra></extra>",
    )
    return drawn


def over_floor(found: Sequence[Row]) -> go.Figure:
    """How many times its floor each contender takes."""
    done = [one for one in reversed(found) if not one["error"]]
    drawn = _bars(len(done), "times the floor")
    drawn.update_layout(showlegend=False)
    colours = [COLOURS[0] if one["ours"] else GREY for one in done]
    drawn.add_bar(
        x=[one["over_floor"] for one in done],
        y=[one["contender"] for one in done],
        orientation="h",
        marker={"color": colours},
        hovertemplate="%{y}: %{x:.2f} times the floor<extra></extra>",
    )
    drawn.add_vline(x=1, line={"color": INK, "width": 2})
    return drawn


def _set(content: dict[str, Any], clock: str) -> list[str]:
    found: list[Row] = content["rows"]
    speed = content["speed"]
    coarse = f"{speed['bfloat16_flops'] / 1e9:.0f} in bfloat16 ones, " if speed["bfloat16_flops"] else ""
    measured = (
        f"Measured here: {speed['flops'] / 1e9:.0f} GFLOP/s in float32 products of these shapes, {coarse}"
        f"{speed['bandwidth'] / 1e9:.0f} GB/s in copies. {content['about']}."
    )
    notes = "".join(f"<li>{escape(line)}</li>" for line in (*comparisons(found), *failures(found)))
    return [
        section(
            content["title"],
            measured,
            figure("Time by phase", stacked(found, clock), "The red mark is the floor."),
            figure("Time by its floor", over_floor(found), "The red line is the floor. Grey: peers."),
        ),
        _show(times(found, clock)),
        f"<p class='soft'>{escape(FOOTNOTE.format(clock=CLOCKS[clock]))}</p>",
        _show(phases(found)),
        f"<p class='soft'>{escape(PHASES_NOTE)}</p><ul class='notes'>{notes}</ul>",
    ]


CLOCKS = {"cpu_ms": "CPU time of one thread", "wall_ms": "the time of day until the GPU was done"}
"""What each column of times in the JSON is measured by."""


def _bars(count: int, title: str) -> go.Figure:
    drawn = blank(title)
    drawn.update_layout(
        height=MARGIN + BAR * count,
        barmode="stack",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        xaxis={"rangemode": "tozero"},
    )
    return drawn


def _bar(drawn: go.Figure, name: str, colour: str, values: Sequence[float], done: Sequence[Row]) -> None:
    drawn.add_bar(
        x=list(values),
        y=[one["contender"] for one in done],
        orientation="h",
        name=name,
        marker={"color": colour},
        hovertemplate=f"%{{y}}<br>{name}: %{{x:.3g}} ms<extra></extra>",
    )


def _show(found: Table) -> str:
    head, lines = found
    return table(head, [row(escape(cells[0]), cells[1:]) for cells in lines])


def _fact(fact: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in fact.items()) if isinstance(fact, dict) else str(fact)
