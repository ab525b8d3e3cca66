"""Devices, as far as the time of a step depends on them: their published peaks, and what is assumed beside those.

Nothing here was measured; `steepest.lab.plan.here` measures the machine at hand instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from steepest.lab.shared.errors import BadInput
from steepest.rule.work import CHOLESKY, EIGH, QR, SVD, Part, Work

Curve = tuple[tuple[int, float], ...]
"""Sizes, ascending, each with a value; straight between them where both are logarithms, and level beyond."""


@dataclass(frozen=True)
class Device:
    """How long things take on it."""

    name: str
    kind: str
    """What options that depend on the device are settled for: "cuda" or "cpu"."""
    speeds: Mapping[str, Curve]
    """FLOPs per second: of products by precision, of decompositions by kind, as `steepest.rule.work.Part` has them;
    sizes as there."""
    bandwidth: float
    """Bytes per second that one kernel reads and writes."""
    entrywise: float
    """Bytes per second of an elementwise rule's step, each counted once."""
    passes: float
    """Bytes per second of a stack's step outside products, each counted once however often it is read."""
    per_stack: float
    """Seconds of a step that one matrix costs whatever its size."""
    per_matrix: float
    """Seconds more for each other matrix of the same shape."""
    training: float
    """FLOPs per second that a model's own share of them (MFU) is of."""
    memory: float
    """Bytes."""

    def seconds(self, work: Work) -> float:
        """How long a step's products and decompositions take, one after the other."""
        return math.fsum(flops / self.speed(part) for part, flops in work.parts.items())

    def speed(self, part: Part) -> float:
        """FLOPs per second of a part of the work."""
        return interpolated(self.speeds[key(part)], part.size)


def key(part: Part) -> str:
    """The name of its curve in `Device.speeds`: a product's precision, a decomposition's kind."""
    return part.precision or part.kind


def interpolated(curve: Curve, size: int) -> float:
    """A curve's value.

    >>> curve = ((100, 1.0), (400, 4.0))
    >>> interpolated(curve, 50), round(interpolated(curve, 200), 12), interpolated(curve, 400), interpolated(curve, 999)
    (1.0, 2.0, 4.0, 4.0)
    """
    at = bisect_left(curve, size, key=lambda point: point[0])
    if at in (0, len(curve)):
        return curve[min(at, len(curve) - 1)][1]
    (low, before), (high, after) = curve[at - 1 : at + 1]
    return before * math.exp(math.log(after / before) * math.log(size / low) / math.log(high / low))


@dataclass(frozen=True)
class Peaks:
    """What a maker publishes: FLOPs per second without sparsity, bytes per second, bytes."""

    float32: float
    """Outside tensor cores."""
    tf32: float
    bfloat16: float
    bandwidth: float
    memory: float


GPUS: Mapping[str, Peaks] = {
    "h200": Peaks(67e12, 494.5e12, 989.5e12, 4.8e12, 141e9),
    "h100": Peaks(67e12, 494.5e12, 989.5e12, 3.35e12, 80e9),
    "a100": Peaks(19.5e12, 156e12, 312e12, 2.039e12, 80e9),
    "l40s": Peaks(91.6e12, 183e12, 362e12, 0.864e12, 48e9),
}
"""NVIDIA's data sheets: H200 SXM, H100 SXM, A100 80GB SXM, L40S."""


@dataclass(frozen=True)
class Assumed:
    """What no data sheet tells. The defaults are guesses with reasons; no GPU was at hand to measure any."""

    products: Curve = ((64, 0.02), (256, 0.2), (1024, 0.55), (4096, 0.75))
    """Share of the peak, by size. Large products reach about three quarters, for want of power and of whole waves of
    tiles. Small ones fill a GPU only in batches, and stacks are batches of a few."""
    decompositions: Mapping[str, Curve] | None = None
    """FLOPs per second by kind, no faster than float32's peak; None: `DECOMPOSITIONS`."""
    bandwidth: float = 0.8
    """Share of the peak, of one kernel that streams."""
    entrywise: float = 0.5
    """Share of the peak, of an elementwise rule's step: a fused kernel's, but norms have gradients read once more."""
    passes: float = 0.5
    """Share of the peak, of a stack's pass: some bytes are read more than once (norms, floors, views)."""
    per_stack: float = 0.3e-3
    """About 60 launches of 5 µs, which the host makes one after the other."""
    per_matrix: float = 20e-6
    """Its gradient's copy and its weight's two passes, launched or looped over."""


DECOMPOSITIONS: Mapping[str, Curve] = {
    QR: ((100, 5e9), (256, 4e10), (1024, 1e12), (2048, 3e12), (4096, 6e12)),
    CHOLESKY: ((100, 5e10), (256, 5e11), (1024, 4e12), (4096, 15e12)),
    EIGH: ((100, 5e9), (512, 1e11), (2048, 6e11), (8192, 2e12)),
    SVD: ((100, 2.5e9), (512, 5e10), (2048, 3e11), (8192, 1e12)),
}
"""FLOPs per second on any of these GPUs. Panels of a few columns wait for each other, so latency limits, not peaks, and
torch decomposes the matrices of a batch one after the other. Reported elsewhere: 1.8 ms for the eigenvectors of
100 rows (5 GFLOP/s); 6 ms for a QR decomposition of 2000 rows (3 TFLOP/s). The rest is drawn from there by the slope
that LAPACK's have. Cholesky's has least to wait for, and triangular solves are mostly products. Singular values: twice
the time of eigenvalues."""

IDEAL = Assumed(
    products=((1, 1.0),),
    decompositions=dict.fromkeys(DECOMPOSITIONS, ((1, math.inf),)),
    bandwidth=1.0,
    entrywise=1.0,
    passes=1.0,
    per_stack=0.0,
    per_matrix=0.0,
)
"""Everything at its peak: the least time there could be."""


def gpu(name: str, assumed: Assumed | None = None) -> Device:
    """A GPU by name.

    Raises:
        BadInput: if it isn't in `GPUS`.

    >>> device = gpu("H200", IDEAL)
    >>> f"{device.speed(Part('product', 256, 'high')):.4g}", f"{device.speed(Part('qr', 256)):.4g}"
    ('4.945e+14', '6.7e+13')
    """
    if name.lower() not in GPUS:
        raise BadInput(f"--gpu {name}: there are {', '.join(GPUS)}, and here, which measures this machine")
    peaks, guess = GPUS[name.lower()], assumed or Assumed()
    # torch computes float32 products in TF32 at "high" and at "medium" alike.
    products = {"highest": peaks.float32, "high": peaks.tf32, "medium": peaks.tf32, "bfloat16": peaks.bfloat16}
    speeds = {precision: _scaled(guess.products, peak) for precision, peak in products.items()}
    decompositions = DECOMPOSITIONS if guess.decompositions is None else guess.decompositions
    for kind, curve in decompositions.items():
        speeds[kind] = tuple((size, min(speed, peaks.float32)) for size, speed in curve)
    return Device(
        name=name.lower(),
        kind="cuda",
        speeds=speeds,
        bandwidth=guess.bandwidth * peaks.bandwidth,
        entrywise=guess.entrywise * peaks.bandwidth,
        passes=guess.passes * peaks.bandwidth,
        per_stack=guess.per_stack,
        per_matrix=guess.per_matrix,
        training=peaks.bfloat16,
        memory=peaks.memory,
    )


def _scaled(curve: Curve, by: float) -> Curve:
    return tuple((size, by * value) for size, value in curve)
