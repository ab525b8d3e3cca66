"""Time kernels against their twins by size, and suggest the `steepest.kernels.Gates` that follow.

python benchmarks/gates.py             # on a GPU: every kernel and its twin in turn, singly and in batches of four
python benchmarks/gates.py --blocks    # on a CPU: symmetric products in blocks against whole ones, one thread
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from timing import enough, seconds

from steepest.kernels import Gates, available, use
from steepest.linalg import symmetric
from steepest.linalg.polar import polar_factor
from steepest.linalg.precision import fp32_matmul_precision, has_tf32
from steepest.linalg.symmetric import accumulate_gram, symmetric_product
from steepest.rules.parts.moments import adam

SIZES = (512, 1024, 2048, 4096, 8192)
BATCHES = (1, 4)
SHAPES = ((1, 512, 512), (1, 512, 2048), (1, 768, 768), (1, 768, 3072), (2, 768, 768), (1, 1024, 1024))
MARGIN = 0.97
"""A kernel pays where it takes at most this share of its twin's time."""
LASTS = 0.02
"""The least seconds of one timing on a GPU."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """A kernel's time beside its twin's: medians, in milliseconds per call."""

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
        """The time of the kernel by that of its twin."""
        return self.kernel / self.twin


def measure_gates(
    device: torch.device | str, sizes: Sequence[int] = SIZES, batches: Sequence[int] = BATCHES, repeats: int = 7
) -> list[Figure]:
    """Time each kernel and its twin in turn, on batches of matrices size × size.

    In Triton's interpreter kernels run on a CPU, and the figures mean nothing.

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
            for what, precision, work in _works(device, size, batch):
                with fp32_matmul_precision("high" if precision == "tf32" else "highest"):
                    figures.append(Figure(what, precision, size, batch, *in_turn(work, device, repeats)))
    return figures


def measure_blocks(shapes: Sequence[tuple[int, ...]] = SHAPES, repeats: int = 7) -> dict[tuple[int, ...], float]:
    """Return the CPU time of `polar_factor` with symmetric products in blocks by that without, for some shapes."""
    ratios = {}
    for shape in shapes:
        G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        times: dict[int, list[float]] = {symmetric.BLOCK: [], 2**62: []}
        for _ in range(repeats):
            for block, seen in times.items():
                with mock.patch.object(symmetric, "BLOCK", block):
                    seen.append(seconds(lambda G=G: polar_factor(G), G.device))  # type: ignore[misc]
        blocked, whole = map(statistics.median, times.values())
        ratios[shape] = blocked / whole
    return ratios


def suggest(figures: Sequence[Figure]) -> Gates:
    """Return the gates that follow from figures: the least size from which on every kernel pays.

    >>> measured = {512: 0.9, 1024: 1.1, 2048: 0.6}
    >>> suggest([Figure("gram", "tf32", size, 1, kernel, twin=1.0) for size, kernel in measured.items()]).tf32
    2048
    """
    gates: dict[str, Any] = {}
    for precision in ("bfloat16", "tf32", "float32"):
        products = [(f.size, f.ratio) for f in figures if f.what != "adam" and f.precision == precision]
        if products:
            gates[precision] = _least(products)
    passes = [(f.batch * f.size**2, f.ratio) for f in figures if f.what == "adam"]
    if passes:
        gates["entries"] = _least(passes)
    return Gates(**gates)


def _least(ratios: Sequence[tuple[int, float]]) -> int | None:
    lost = max((size for size, ratio in ratios if ratio >= MARGIN), default=-1)
    return min((size for size, _ in ratios if size > lost), default=None)


def _works(device: torch.device, size: int, batch: int) -> Iterator[tuple[str, str, Work]]:
    """Yield the calls to time, each with its name and precision."""
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
    state = {"exp_avg": torch.zeros_like(X), "exp_avg_sq": torch.zeros_like(X)}
    t = torch.full((batch, 1, 1), 10.0, device=device)
    options: dict[str, Any] = {"momentum_floor": True, "noise_floor": 1e-2}
    yield "adam", "float32", lambda: adam(X, state, t, (0.9, 0.95), 1e-8, **options)


def in_turn(work: Work, device: torch.device, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of a call with kernels, and of one with their twins, timed in turn."""
    times: dict[str, list[float]] = {"always": [], "never": []}
    calls = 1
    for mode in times:
        with use(mode):
            calls = max(calls, enough(work, device, LASTS if device.type == "cuda" else 0.0))
    for _ in range(repeats):
        for mode, seen in times.items():
            with use(mode):
                seen.append(seconds(work, device, calls) / calls * 1e3)
    return statistics.median(times["always"]), statistics.median(times["never"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", action="store_true", help="time blocks of symmetric products on a CPU")
    args = parser.parse_args()
    if args.blocks:
        torch.set_num_threads(1)
        for shape, ratio in measure_blocks().items():
            print(f"{' × '.join(map(str, shape))}: {ratio:.2f}")
        return
    try:
        figures = measure_gates(args.device)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    for figure in figures:
        size = f"{figure.batch} × {figure.size}"
        print(f"{figure.what:20} {figure.precision:9} {size:>9}: kernel by twin {figure.ratio:.2f}")
    print(f"kernels.gates = kernels.{suggest(figures)}")


if __name__ == "__main__":
    main()
