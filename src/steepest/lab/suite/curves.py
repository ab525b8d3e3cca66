"""The small curves in the cells of the leaderboard, as SVG: final loss over the length of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from steepest.lab.suite.protocol import LADDER

WIDTH, HEIGHT, MARGIN = 70, 36, 3
DECADE = 10.0
"""From this ratio of losses on, their axis is logarithmic."""
Lengths = Sequence[Mapping[str, Any]]
"""Of a cell in the results: the share of the whole length, and the losses by seed."""


def curve(ours: Lengths, baseline: Lengths) -> Markup:
    """Return the curve of a contender, its seeds as dots, over that of the baseline, whose final loss is dashed."""
    finite = [loss for row in (*ours, *baseline) for loss in row["losses"] if loss is not None]
    if not finite:
        return Markup("")
    low, high = min(finite), max(finite)
    logarithmic = low > 0 and high > DECADE * low

    def height(loss: float) -> float:
        if high == low:
            return HEIGHT / 2
        part = math.log(loss / low) / math.log(high / low) if logarithmic else (loss - low) / (high - low)
        return round(HEIGHT - MARGIN - part * (HEIGHT - 2 * MARGIN), 1)

    def line(rows: Lengths, style: str) -> str:
        points = [(_across(row["share"]), height(mean)) for row in rows if (mean := _mean(row)) is not None]
        return f'<polyline class="{style}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'

    dots = "".join(
        f'<circle cx="{_across(row["share"])}" cy="{height(loss)}" r="1.3"/>'
        for row in ours
        for loss in row["losses"]
        if loss is not None
    )
    target = next((_mean(row) for row in baseline if row["share"] == 1), None)
    dashed = "" if target is None else f'<path class="target" d="M0 {height(target)}H{WIDTH}"/>'
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" aria-hidden="true">'
        f"{dashed}{line(baseline, 'base')}{line(ours, 'own')}{dots}</svg>"
    )


def _across(share: float) -> float:
    """Return the position of a length, on a logarithmic axis."""
    part = math.log(share / LADDER[0]) / math.log(LADDER[-1] / LADDER[0])
    return round(MARGIN + part * (WIDTH - 2 * MARGIN), 1)


def _mean(row: Mapping[str, Any]) -> float | None:
    """Return the mean loss over seeds; None if one of them diverged."""
    losses = row["losses"]
    return None if None in losses else sum(losses) / len(losses)
