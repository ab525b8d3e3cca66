"""What a machine can do, measured on it, and the least time that an optimizer's step could take there."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from steepest.lab.bench.shapes import ShapeSet
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.stopwatch import bfloat16_pays
from steepest.rule import Elementwise, Rule
from steepest.rule.work import work
from steepest.rules.parts.newton_schulz import NewtonSchulz, survives_bfloat16

LONGEST = 1024
"""Sides are cut to it on a CPU: speed stays the same beyond, and a product of 8192×8192 takes seconds."""
ROUNDS, ENOUGH = 3, 0.05
"""Each product is timed so often, and until so many seconds have gone; the fastest counts."""
FLOAT = 4
"""Bytes of an entry."""


@dataclass(frozen=True)
class Speed:
    """Of one device, for the shapes at hand."""

    flops: float
    """FLOPs per second of float32 products: left and right ones, of each shape in proportion."""
    bfloat16_flops: float
    """The same in bfloat16; 0 where the device is no faster in it."""
    bandwidth: float
    """Bytes per second of a copy, read and written, of as many entries as the matrices have."""


@dataclass(frozen=True)
class Floor:
    """Seconds that a step takes at least, at a machine's measured speed."""

    products: float
    """FLOPs of products and decompositions, all at the speed of products."""
    passes: float
    """Bytes that must be moved."""

    @property
    def seconds(self) -> float:
        """One after the other: passes over the entries wait for products, and products for them."""
        return self.products + self.passes


def measure_speed(shapes: ShapeSet, device: torch.device) -> Speed:
    """Time products and copies on a device. On a CPU, by this thread's CPU time."""
    clock = clock_of(device)
    coarse = _flops(shapes, device, torch.bfloat16, clock) if bfloat16_pays(device) else 0.0
    entries = torch.rand(min(shapes.entries, 2**26), device=device)
    copied = torch.empty_like(entries)
    took = fastest(lambda: copied.copy_(entries), clock)
    return Speed(_flops(shapes, device, torch.float32, clock), coarse, 2 * entries.nbytes / took)


def _flops(shapes: ShapeSet, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOPs per second of products ``[m, m] [m, n]`` and ``[m, n] [n, n]``, over all shapes."""
    limit = LONGEST if device.type == "cpu" else max(max(pair) for pair in shapes.matrices)
    flops = seconds = 0.0
    with fp32_matmul_precision("highest"):
        for (m, n), count in Counter(shapes.matrices).items():
            m, n = min(m, limit), min(n, limit)
            left, G, right = (torch.rand(size, device=device).to(dtype) for size in ((m, m), (m, n), (n, n)))
            for A, B in ((left, G), (G, right)):
                out = A @ B
                took = fastest(lambda A=A, B=B, out=out: torch.mm(A, B, out=out), clock)  # type: ignore[misc]
                flops += count * 2 * m * A.shape[1] * n
                seconds += count * took
    return flops / seconds


def floor(rule: Rule | Elementwise, shapes: ShapeSet, speed: Speed) -> Floor:
    """The least time of a rule's step.

    FLOPs are those of `steepest.rule.work.work`, in float32; those of Newton-Schulz iterations in bfloat16 where that
    takes less time, unless the rule forbids it. Bytes: all state is read and written once, and of each
    entry its gradient read and gathered, its direction written and read, its weight read and written; an elementwise
    rule neither gathers nor writes down directions. For SOAP, that is 40mn + 16(m² + n²) bytes.
    """
    traffic = 0.0
    for shape in shapes.shapes:
        if isinstance(rule, Rule):
            state, passes = rule.init(torch.empty(1, shape.m, shape.n, device="meta")), 6
        else:
            state, passes = rule.init(torch.empty(shape.m, shape.n, device="meta")), 3
        moved = 2 * sum(x.nbytes for x in state.values()) + passes * FLOAT * shape.m * shape.n
        traffic += shape.count * moved
    return Floor(_products(rule, shapes, speed), traffic / speed.bandwidth)


def _products(rule: Rule | Elementwise, shapes: ShapeSet, speed: Speed) -> float:
    """Seconds for a rule's FLOPs."""
    if isinstance(rule, Elementwise):
        return 0.0
    ways: list[tuple[Rule, float]] = [(rule, speed.flops)]
    if isinstance(rule, NewtonSchulz) and rule.ns_dtype != "float32":
        ways = [(replace(rule, ns_dtype="float32"), speed.flops)]
        if speed.bfloat16_flops and survives_bfloat16(rule.ns):
            ways.append((replace(rule, ns_dtype="bfloat16"), speed.bfloat16_flops))
    return min(
        sum(shape.count * work(way, shape.m, shape.n).total for shape in shapes.shapes) / rate for way, rate in ways
    )


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: of this thread's CPU time on a CPU; elsewhere of the time of day, once the device has done its work."""
    if device.type == "cpu":
        return time.thread_time

    def elapsed() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return elapsed


def fastest(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the fastest of some calls."""
    rounds, spent, best = 0, 0.0, math.inf
    while rounds < ROUNDS or spent < ENOUGH:
        start = clock()
        work()
        took = clock() - start
        rounds, spent, best = rounds + 1, spent + took, min(best, took or math.inf)
    return best
