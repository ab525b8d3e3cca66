"""The speeds of devices on which the time of a step depends: published peaks, and assumed shares of them.

None of these was measured. `steepest.lab.plan.here` measures the machine at hand instead.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from steepest.lab.shared.errors import BadInput
from steepest.rule.work import CHOLESKY, EIGH, PRODUCT, QR, SVD, Part, Work

Curve = tuple[tuple[int, float], ...]
"""Ascending sizes with their values; between them a straight line of logarithms, beyond them level."""


@dataclass(frozen=True)
class Device:
    """The speeds and the memory of a device."""

    name: str
    kind: str
    """The type of device for options that depend on it: "cuda" or "cpu"."""
    speeds: Mapping[str, Curve]
    """FLOPs per second of products by precision and of decompositions by kind, by size, as
    `steepest.rule.work.Part` has them."""
    bandwidth: float
    """Bytes per second of a kernel that reads and writes."""
    entrywise: float
    """Bytes per second of an elementwise rule's step, each counted once."""
    passes: float
    """Bytes per second of a stack's step outside products, each counted once however often it is read."""
    per_stack: float
    """Seconds of a step of one matrix, whatever its size."""
    per_matrix: float
    """Seconds more for each other matrix of the same shape."""
    training: float
    """FLOPs per second of which a model's utilization (MFU) is a share."""
    memory: float
    """Bytes."""

    def seconds(self, work: Work) -> float:
        """Return the seconds of a step's products and decompositions, one after the other."""
        return math.fsum(flops / self.speed(part) for part, flops in work.parts.items())

    def speed(self, part: Part) -> float:
        """Return the FLOPs per second of a part. Products without a precision of their own are float32 ones."""
        return interpolated(self.speeds[key(part)], part.size)


def key(part: Part) -> str:
    """Return the key of a part in `Device.speeds`."""
    return (part.precision or "highest") if part.kind == PRODUCT else part.kind


def interpolated(curve: Curve, size: int) -> float:
    """Return the value of a curve at a size.

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
    """Published peaks of a GPU: FLOPs per second without sparsity, bytes per second, bytes."""

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
"""GPUs by name, after NVIDIA's data sheets: H200 SXM, H100 SXM, A100 80GB SXM, L40S."""


# No data sheet tells the following. They are guesses with reasons: no GPU was at hand to measure any.
PRODUCTS: Curve = ((64, 0.02), (256, 0.2), (1024, 0.55), (4096, 0.75))
"""The share of its peak at which a GPU multiplies, by size. Large products reach about three quarters, for want of
power and of whole waves of tiles. Small ones fill a GPU only in batches, and stacks are batches of a few."""
STREAMED = 0.8
"""The share of its bandwidth that one kernel reaches which reads and writes everything once."""
REREAD = 0.5
"""The share of its bandwidth that steps reach outside products, each byte counted once. Some are read more than once:
elementwise rules read gradients for their norms too, and stacks have norms, floors and views."""
PER_STACK = 0.3e-3
"""Seconds of a stack: about 60 launches of 5 µs, which the host makes one after the other."""
PER_MATRIX = 20e-6
"""Seconds of a further matrix: its gradient's copy and its weight's two passes, launched or looped over."""

DECOMPOSITIONS: Mapping[str, Curve] = {
    QR: ((100, 5e9), (256, 4e10), (1024, 1e12), (2048, 3e12), (4096, 6e12)),
    CHOLESKY: ((100, 5e10), (256, 5e11), (1024, 4e12), (4096, 15e12)),
    EIGH: ((100, 5e9), (512, 1e11), (2048, 6e11), (8192, 2e12)),
    SVD: ((100, 2.5e9), (512, 5e10), (2048, 3e11), (8192, 1e12)),
}
"""FLOPs per second on any of these GPUs, but no more than float32's peak. Panels of a few columns wait for each other,
so latency limits them, and torch decomposes the matrices of a batch one after the other. Reported elsewhere are 1.8 ms
for the eigenvectors of 100 rows (5 GFLOP/s) and 6 ms for a QR decomposition of 2000 rows (3 TFLOP/s). The rest is drawn
from there by the slope that LAPACK's have. Cholesky decompositions have least to wait for, and triangular solves are
mostly products. Singular values take twice the time of eigenvalues."""


def gpu(name: str) -> Device:
    """Return a GPU by name.

    Raises:
        BadInput: if it isn't in `GPUS`.

    >>> device = gpu("H200")
    >>> f"{device.speed(Part('product', 1024, 'high')):.4g}", f"{device.speed(Part('qr', 256)):.4g}"
    ('2.72e+14', '4e+10')
    """
    if name.lower() not in GPUS:
        raise BadInput(f"--gpu {name}: there are {', '.join(GPUS)}, and here, which measures this machine")
    peaks = GPUS[name.lower()]
    # torch computes float32 products in TF32 at "high" and at "medium" alike.
    products = {"highest": peaks.float32, "high": peaks.tf32, "medium": peaks.tf32, "bfloat16": peaks.bfloat16}
    speeds = {
        precision: tuple((size, peak * share) for size, share in PRODUCTS) for precision, peak in products.items()
    }
    for kind, curve in DECOMPOSITIONS.items():
        speeds[kind] = tuple((size, min(speed, peaks.float32)) for size, speed in curve)
    return Device(
        name=name.lower(),
        kind="cuda",
        speeds=speeds,
        bandwidth=STREAMED * peaks.bandwidth,
        entrywise=REREAD * peaks.bandwidth,
        passes=REREAD * peaks.bandwidth,
        per_stack=PER_STACK,
        per_matrix=PER_MATRIX,
        training=peaks.bfloat16,
        memory=peaks.memory,
    )
