"""Kernels against their twins, by size: the figures that `steepest.kernels.Gates` should follow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.kernels import Gates, available, use
from steepest.linalg import symmetric
from steepest.linalg.polar import polar_factor
from steepest.linalg.precision import fp32_matmul_precision, has_tf32
from steepest.linalg.symmetric import accumulate_gram, symmetric_product

SIZES = (512, 1024, 2048, 4096, 8192)
BATCHES = (1, 4)
SHAPES = ((1, 512, 512), (1, 512, 2048), (1, 768, 768), (1, 768, 3072), (2, 768, 768), (1, 1024, 1024))
LASTS = 0.02
"""Seconds that one timing should last, at least, on a GPU: launches and the clock then don't count."""

Work = Callable[[], object]
Adam = Callable[..., Tensor]


@dataclass(frozen=True)
class Figure:
    """One comparison. Times are medians, in milliseconds per call."""

    what: str
    """"gram", "gram of a transpose", "polynomial" or "adam"."""
    precision: str
    """"bfloat16", "tf32" or "float32"."""
    size: int
    """Matrices are size × size."""
    batch: int
    kernel: float
    twin: float

    @property
    def ratio(self) -> float:
        """Time of the kernel over time of the twin.

        >>> Figure("gram", "tf32", 2048, 1, kernel=1.0, twin=2.0).ratio
        0.5
        """
        return self.kernel / self.twin


def measure_gates(
    device: torch.device | str,
    adam: Adam | None = None,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    repeats: int = 7,
) -> list[Figure]:
    """Time each kernel and its twin in turn, on matrices size × size, singly and in batches.

    Args:
        device: one on which kernels can run. In Triton's interpreter that is a CPU, and the figures mean nothing.
        adam: `steepest.rules.parts.moments.adam`, which stands above this module; None leaves it out.
        sizes: of matrices.
        batches: how many at once.
        repeats: timings of each, of which the median counts. The two alternate.

    Raises:
        ValueError: if kernels can't run on this device, or Triton is missing.
    """
    device = torch.device(device)
    with use("always"):
        if not available(torch.zeros(1, device=device)):
            raise ValueError(
                f"device={str(device)!r}: kernels don't run there; they need CUDA and Triton, and STEEPEST_KERNELS "
                f"must not be 'never'"
            )
    figures = []
    for size in sizes:
        for batch in batches:
            for what, precision, work in _works(device, size, batch, adam):
                with fp32_matmul_precision("high" if precision == "tf32" else "highest"):
                    kernel, twin = in_turn(work, device, repeats)
                figures.append(Figure(what, precision, size, batch, kernel, twin))
    return figures


def measure_blocks(shapes: Sequence[tuple[int, ...]] = SHAPES, repeats: int = 7) -> dict[tuple[int, ...], float]:
    """What blocks of symmetric products are worth on a CPU: the time of `polar_factor` with them over that without.

    Args:
        shapes: of batches ``[N, m, n]`` in float32.
        repeats: runs of each, in turn; medians of this thread's CPU time are compared.
    """
    ratios = {}
    for shape in shapes:
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for blocked, seen in times.items():
                before, symmetric.BLOCK = symmetric.BLOCK, symmetric.BLOCK if blocked else 2**62
                try:
                    start = time.thread_time()
                    polar_factor(G)
                    seen.append(time.thread_time() - start)
                finally:
                    symmetric.BLOCK = before
        ratios[shape] = statistics.median(times[True]) / statistics.median(times[False])
    return ratios


def suggest(figures: Sequence[Figure], margin: float = 0.97) -> Gates:
    """Gates that follow from figures: the least size from which on every figure has a ratio below ``margin``.

    >>> measured = {512: 0.9, 1024: 1.1, 2048: 0.6}
    >>> suggest([Figure("gram", "tf32", size, 1, kernel, twin=1.0) for size, kernel in measured.items()]).tf32
    2048
    """
    gates: dict[str, Any] = {}
    for precision in ("bfloat16", "tf32", "float32"):
        products = [figure for figure in figures if figure.what != "adam" and figure.precision == precision]
        if products:
            gates[precision] = _least(products, lambda figure: figure.size, margin)
    passes = [figure for figure in figures if figure.what == "adam"]
    if passes:
        gates["entries"] = _least(passes, lambda figure: figure.batch * figure.size**2, margin)
    return Gates(**gates)


def _least(figures: Sequence[Figure], size: Callable[[Figure], int], margin: float) -> int | None:
    lost = max((size(figure) for figure in figures if figure.ratio >= margin), default=-1)
    return min((size(figure) for figure in figures if size(figure) > lost), default=None)


def _works(device: torch.device, size: int, batch: int, adam: Adam | None) -> Iterator[tuple[str, str, Work]]:
    """What is timed: its name, precision, and a call."""
    generator = torch.Generator(device).manual_seed(0)
    X = torch.randn(batch, size, size, device=device, generator=generator)
    K = torch.zeros_like(X)
    A = (X + X.mT) / size**0.5
    precisions = ["bfloat16", "tf32", "float32"] if has_tf32(device) else ["bfloat16", "float32"]
    for precision in precisions:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        Y, L, B = X.to(dtype), K.to(dtype), A.to(dtype)
        yield "gram", precision, lambda L=L, Y=Y: accumulate_gram(L, Y, 0.95)  # type: ignore[misc]
        yield "gram of a transpose", precision, lambda L=L, Y=Y: accumulate_gram(L, Y.mT, 0.95)  # type: ignore[misc]
        yield "polynomial", precision, lambda B=B: symmetric_product(B, B, B, 0.5, 0.1)  # type: ignore[misc]
    if adam is not None:
        state = {"exp_avg": torch.zeros_like(X), "exp_avg_sq": torch.zeros_like(X)}
        t = torch.full((batch, 1, 1), 10.0, device=device)
        options: dict[str, Any] = {"momentum_floor": True, "noise_floor": 1e-2}
        yield "adam", "float32", lambda: adam(X, state, t, (0.9, 0.95), 1e-8, **options)


def in_turn(work: Work, device: torch.device, repeats: int) -> tuple[float, float]:
    """Medians of kernel and twin, in milliseconds per call."""
    calls = 1
    for mode in ("always", "never"):  # the first call compiles
        with use(mode):
            _seconds(work, device, 1)
            once = _seconds(work, device, 1)
            calls = max(calls, round(LASTS / once)) if device.type == "cuda" else 1
    times: dict[str, list[float]] = {"always": [], "never": []}
    for _ in range(repeats):
        for mode, seen in times.items():
            with use(mode):
                seen.append(_seconds(work, device, calls) / calls * 1e3)
    return statistics.median(times["always"]), statistics.median(times["never"])


def _seconds(work: Work, device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start_event.record()
        for _ in range(calls):
            work()
        stop_event.record()
        torch.cuda.synchronize(device)
        return float(start_event.elapsed_time(stop_event)) / 1e3
