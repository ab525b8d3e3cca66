"""The measured speed of a machine, and the least time that an optimizer's step could take at it."""

from __future__ import annotations

from collections import Counter

import torch

from steepest.lab.bench.shapes import ShapeSet
from steepest.lab.plan.devices import DECOMPOSITIONS, Device
from steepest.lab.plan.here import clock_of, curve, fastest
from steepest.lab.plan.time import FLOAT, Load, step_times
from steepest.linalg.precision import PRECISIONS
from steepest.linalg.stopwatch import bfloat16_pays
from steepest.rule import Elementwise, Rule
from steepest.rules.adamw import AdamW


def measure_speed(shapes: ShapeSet, device: torch.device) -> Device:
    """Measure products and copies, as a device on which everything else runs at their speed.

    Products are square, with as many FLOPs as ``[m, m] [m, n]`` and ``[m, n] [n, n]`` have for these shapes.
    """
    clock = clock_of(device)
    sizes = {round((m * n * d) ** (1 / 3)) for m, n in shapes.matrices for d in (m, n)}
    products = curve("highest", sizes, device, clock)
    coarse = curve("bfloat16", sizes, device, clock) if bfloat16_pays(device) else products
    entries = torch.rand(min(shapes.entries, 2**26), device=device)
    copied = torch.empty_like(entries)
    bandwidth = 2 * entries.nbytes / fastest(lambda: copied.copy_(entries), clock)
    return Device(
        name="ideal",
        kind=device.type,
        speeds=dict.fromkeys((*PRECISIONS, *DECOMPOSITIONS), products) | {"bfloat16": coarse},
        bandwidth=bandwidth,
        entrywise=bandwidth,
        passes=bandwidth,
        per_stack=0.0,
        per_matrix=0.0,
        training=products[-1][1],
        memory=0.0,
    )


def floor(rule: Rule | Elementwise, shapes: ShapeSet, ideal: Device) -> float:
    """Return the least seconds of a rule's step: what `steepest.lab.plan.time` predicts for an ideal device.

    Bytes are twice the state, and 24 per entry for gradient, direction and weight: for SOAP 40mn + 16(m² + n²).
    """
    if isinstance(rule, Elementwise):
        return step_times((rule, rule), Load(entries=shapes.entries), ideal, FLOAT)[0]
    load = Load(Counter((m, n, 0) for m, n in shapes.matrices))
    return step_times((rule, AdamW()), load, ideal, FLOAT)[0]
