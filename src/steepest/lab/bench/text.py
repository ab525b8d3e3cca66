"""The tables and sentences of a bench, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steepest.engine.phases import PHASES, REST
from steepest.lab.plan.text import milliseconds
from steepest.lab.shared.table import Table

Row = dict[str, Any]

CLOCKS = {"cpu_ms": "CPU time of one thread", "wall_ms": "wall time until the GPU was done"}
"""The clocks of step times, by their key in a row."""
TIMES_NOTE = (
    "Milliseconds of a step: its mean, median, 95th percentile and maximum, by {clock}; wall: the mean wall time. "
    "/floor: the mean by the least time for the same work at this machine's measured speed. B/el: bytes of state "
    "per entry of the weights; peak: of all that was allocated at once, first step included. ratio: the mean by that "
    "of the fastest peer with the same work, which * marks; without one, by the first of ours."
)
PHASES_NOTE = "Milliseconds of a step by phase, refreshes on the average. Peers show none."
HYPHENATED = {"orthogonalize": "orthogo-\nnalize", "elementwise": "element-\nwise"}


def times(found: Sequence[Row], clock: str) -> Table:
    """Return the table of step times."""
    head = ["", "mean", "p50", "p95", "max", "max/\nmean", "wall", "/floor", "B/el", "peak", "ratio"]
    marks = {row["baseline"] for row in found if not row["error"]}
    lines = []
    for row in found:
        cells = [row["contender"] + (" *" if row["contender"] in marks else "")]
        if not row["error"]:
            main = row[clock]
            cells += [milliseconds(main[key]) for key in ("mean", "p50", "p95", "max")]
            cells += [f"{main['max_over_mean']:.2f}", milliseconds(row["wall_ms"]["mean"]), f"{row['over_floor']:.2f}"]
            cells += [f"{row[f'{kind}_bytes_per_entry']:.1f}" for kind in ("state", "peak")] + [f"{row['ratio']:.2f}"]
        lines.append(cells + [""] * (len(head) - len(cells)))
    return Table(head, lines)


def phases(found: Sequence[Row]) -> Table:
    """Return the table of the phases that occurred, for our optimizers."""
    ours = [row for row in found if row["ours"] and not row["error"]]
    names = [name for name in (*PHASES, REST) if any(name in row["phases_ms"] for row in ours)]
    lines = [
        [
            row["contender"],
            *(milliseconds(row["phases_ms"].get(n)) for n in names),
            milliseconds(row["floor_ms"]),
        ]
        for row in ours
    ]
    return Table(["", *(HYPHENATED.get(name, name) for name in names), "floor"], lines)


def notes(found: Sequence[Row]) -> list[str]:
    """Return a line for each of ours with its share of every peer's time, and one for each entrant that failed."""
    lines = []
    for row in found:
        if row["error"]:
            lines.append(f"{row['contender']}: {row['error']}")
        elif row["ours"] and row["ratios"]:
            ratios = ", ".join(f"{ratio:.2f} of {peer}" for peer, ratio in row["ratios"].items())
            lines.append(f"{row['contender']}: {ratios}")
    return lines


def speed_line(speed: Mapping[str, float]) -> str:
    """Format the measured speeds of a machine in one line.

    >>> speed_line({"flops": 1e11, "bfloat16_flops": 1e11, "bandwidth": 2e10})
    '100 GFLOP/s in float32 products of these sizes, 20 GB/s in copies'
    """
    coarse = f", {speed['bfloat16_flops'] / 1e9:.0f} in bfloat16 ones" * (speed["bfloat16_flops"] > speed["flops"])
    exact = f"{speed['flops'] / 1e9:.0f} GFLOP/s in float32 products of these sizes"
    return f"{exact}{coarse}, {speed['bandwidth'] / 1e9:.0f} GB/s in copies"
