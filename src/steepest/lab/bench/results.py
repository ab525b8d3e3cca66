"""Benchmark a set of shapes, and give the results as JSON has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steepest.lab.bench.entrants import Entrant
from steepest.lab.bench.measure import Measured, measure, summary
from steepest.lab.bench.shapes import ShapeSet
from steepest.lab.bench.speed import floor, measure_speed
from steepest.lab.plan.devices import Device

Row = dict[str, Any]


def bench(
    shapes: ShapeSet,
    entrants: Sequence[Entrant],
    device: torch.device,
    steps: int,
    warmup: int,
    progress: Callable[[str], None] = lambda what: None,
    late: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure the device's speed and the entrants' steps; the arguments are those of `steepest.lab.bench.measure`."""
    speed = measure_speed(shapes, device)
    flops, coarse = (max(rate for _, rate in speed.speeds[name]) for name in ("highest", "bfloat16"))
    found = measure(entrants, shapes.matrices, device, steps, warmup, progress, late)
    return {
        "name": shapes.name,
        "title": str(shapes),
        "about": shapes.about,
        "layers": shapes.layers,
        "of_layers": shapes.of_layers,
        "warmup": warmup,
        "clock": "wall_ms" if device.type == "cuda" else "cpu_ms",
        "speed": {"flops": flops, "bfloat16_flops": coarse, "bandwidth": speed.bandwidth},
        "rows": rows(found, shapes, speed),
    }


def rows(found: Sequence[Measured], shapes: ShapeSet, speed: Device) -> list[Row]:
    """Return one row for each entrant, in order. The row of one that failed has its error and no figures."""
    return [_row(one, found, shapes, speed) for one in found]


def _row(one: Measured, found: Sequence[Measured], shapes: ShapeSet, speed: Device) -> Row:
    entrant = one.entrant
    row: Row = {
        "contender": entrant.label,
        "family": str(entrant.family),
        "ours": entrant.ours,
        "settings": dict(entrant.settings),
        "error": one.error,
    }
    if one.error:
        return row
    least = floor(entrant.rule, shapes, speed)
    family = [other for other in found if other.entrant.family == entrant.family and not other.error]
    peers = [other for other in family if not other.entrant.ours]
    # It is compared with the fastest peer that does the same work, or else with the first of ours that does.
    base = min(peers, key=lambda peer: peer.mean, default=family[0])
    return row | {
        "cpu_ms": summary(one.cpu),
        "wall_ms": summary(one.wall),
        "phases_ms": one.phase_means(),
        "floor_ms": 1e3 * least,
        "over_floor": one.mean / least,
        "state_bytes_per_entry": one.state_bytes / shapes.entries,
        "peak_bytes_per_entry": one.peak_bytes / shapes.entries,
        "baseline": base.entrant.label,
        "ratio": one.mean / base.mean,
        "ratios": {peer.entrant.label: one.mean / peer.mean for peer in peers if peer is not one},
        "cpu_ms_by_step": [1e3 * seconds for seconds in one.cpu],
        "wall_ms_by_step": [1e3 * seconds for seconds in one.wall],
    }
