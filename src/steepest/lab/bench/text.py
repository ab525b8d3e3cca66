"""What a bench says: rows as JSON has them, and as tables show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steepest.engine.phases import PHASES, REST
from steepest.lab.bench.measure import Measured, summary
from steepest.lab.bench.shapes import ShapeSet
from steepest.lab.bench.speed import Speed, floor

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

FOOTNOTE = (
    "Milliseconds of a step: its mean, median, 95th percentile and maximum, by {clock}; wall: the mean by the time of "
    "day. /floor: the mean by the least time for the same work at this machine's measured speed. B/el: bytes of state "
    "per entry of the weights; peak: of all that was allocated at once, first step included. ratio: the mean by that "
    "of the fastest peer with the same work, which * marks; without one, by the first of ours."
)
HYPHENATED = {"orthogonalize": "orthogo-\nnalize", "elementwise": "element-\nwise"}
PHASES_NOTE = "Milliseconds of a step by phase, refreshes on the average. Peers show none."


def rows(found: Sequence[Measured], shapes: ShapeSet, speed: Speed) -> list[Row]:
    """One for each entrant, in order; of one that raised, its error and nothing measured."""
    return [_row(one, found, shapes, speed) for one in found]


def yardstick(one: Measured, found: Iterable[Measured]) -> Measured | None:
    """Whom an entrant is compared with: the fastest peer of its family, or else the first of ours in it.

    None if nobody of the family has come through.
    """
    family = [other for other in found if other.entrant.family == one.entrant.family and not other.error]
    peers = [other for other in family if not other.entrant.ours]
    return min(peers, key=lambda peer: peer.mean, default=next(iter(family), None))


def times(found: Sequence[Row], clock: str) -> Table:
    """The table of step times."""
    head = ["", "mean", "p50", "p95", "max", "max/\nmean", "wall", "/floor", "B/el", "peak", "ratio"]
    marks = {row["yardstick"] for row in found if not row["error"]}
    lines = []
    for row in found:
        name = row["contender"] + (" *" if row["contender"] in marks else "")
        if row["error"]:
            lines.append([name, *[""] * (len(head) - 1)])
            continue
        main = row[clock]
        cells = [milliseconds(main[key]) for key in ("mean", "p50", "p95", "max")]
        cells += [f"{main['max_over_mean']:.2f}", milliseconds(row["wall_ms"]["mean"]), f"{row['over_floor']:.2f}"]
        cells += [f"{row['state_bytes_per_entry']:.1f}", f"{row['peak_bytes_per_entry']:.1f}", f"{row['ratio']:.2f}"]
        lines.append([name, *cells])
    return head, lines


def phases(found: Sequence[Row]) -> Table:
    """The table of phases: of ours, and those that occurred."""
    ours = [row for row in found if row["ours"] and not row["error"]]
    names = [name for name in (*PHASES, REST) if any(name in row["phases_ms"] for row in ours)]
    lines = [
        [
            row["contender"],
            *map(milliseconds, [row["phases_ms"].get(name) for name in names] + [row["floor_ms"]["sum"]]),
        ]
        for row in ours
    ]
    return ["", *(HYPHENATED.get(name, name) for name in names), "floor"], lines


def comparisons(found: Sequence[Row]) -> list[str]:
    """For each of ours with peers, a line: its share of the time of each."""
    lines = []
    for row in found:
        peers = {} if row["error"] or not row["ours"] else row["ratios"]
        if peers:
            lines.append(f"{row['contender']}: " + ", ".join(f"{ratio:.2f} of {peer}" for peer, ratio in peers.items()))
    return lines


def failures(found: Sequence[Row]) -> list[str]:
    """Who raised what."""
    return [f"{row['contender']}: {row['error']}" for row in found if row["error"]]


def missing_note(package: str) -> str:
    """What to do about a peer that isn't there."""
    return f'{package} is not installed, so its optimizers are left out: pip install "steepest[peers]"'


def milliseconds(value: float | None) -> str:
    """Three digits, and no more than two behind the point.

    >>> milliseconds(1234.5), milliseconds(12.345), milliseconds(0.0123), milliseconds(None)
    ('1234', '12.3', '0.01', '')
    """
    if value is None:
        return ""
    return f"{value:.{max(0, min(2, 2 - math.floor(math.log10(value)))) if value > 0 else 2}f}"


def _row(one: Measured, found: Sequence[Measured], shapes: ShapeSet, speed: Speed) -> Row:
    entrant = one.entrant
    row: Row = {
        "contender": entrant.label,
        "family": str(entrant.family),
        "ours": entrant.ours,
        "settings": {name: _plain(value) for name, value in entrant.settings.items()},
        "error": one.error,
    }
    base = yardstick(one, found)
    if one.error or base is None:
        return row
    least = floor(entrant.rule, shapes, speed)
    peers = [other for other in found if other.entrant.family == entrant.family and not other.entrant.ours]
    return row | {
        "cpu_ms": _scaled(summary(one.cpu)),
        "wall_ms": _scaled(summary(one.wall)),
        "phases_ms": _scaled(one.phase_means()),
        "floor_ms": _scaled({"products": least.products, "passes": least.passes, "sum": least.seconds}),
        "over_floor": one.mean / least.seconds,
        "state_bytes_per_entry": one.state_bytes / shapes.entries,
        "held_bytes_per_entry": one.held_bytes / shapes.entries,
        "peak_bytes_per_entry": one.peak_bytes / shapes.entries,
        "peak_bytes": one.peak_bytes,
        "yardstick": base.entrant.label,
        "ratio": one.mean / base.mean,
        "ratios": {peer.entrant.label: one.mean / peer.mean for peer in peers if not peer.error and peer is not one},
        "cpu_ms_by_step": [1e3 * seconds for seconds in one.cpu],
        "wall_ms_by_step": [1e3 * seconds for seconds in one.wall],
    }


def _scaled(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: value if name == "max_over_mean" else 1e3 * value for name, value in seconds.items()}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value if isinstance(value, int | float | str) else str(value)
