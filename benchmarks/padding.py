"""QR decompositions on a CPU, with rows of zeros below the matrix and without: their time by size, as a ratio.

    python benchmarks/padding.py --out benchmarks/results/padding.json

LAPACK wants columns contiguous. Where they begin a power of two apart, or a small multiple of one, entries of a row
share a few lines of the cache and drive each other out. What is compared is what a refresh computes: reflections, and
orthonormal columns made of them. One thread, CPU time, in turn; the least of several.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from steepest.linalg.solvers import ALIGNED, by_columns

SIZES = (64, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048, 2304, 3072)
WORK = 4e9
"""FLOPs for each of the two at each size, at least two decompositions."""


def decomposed(A: Tensor) -> Tensor:
    """The Q of ``A [m, d]``."""
    return torch.linalg.householder_product(*torch.geqrf(A))


def padded(A: Tensor, rows: int) -> Tensor:
    """The same, with rows of zeros below for the time that it takes."""
    below = A.new_zeros(A.shape[-1], rows)
    return by_columns(decomposed(torch.cat([A.mT, below], dim=-1).mT)[: A.shape[0]])


def least(calls: int, *functions: Callable[[], object]) -> list[float]:
    """Seconds that each takes at best."""
    best = [float("inf")] * len(functions)
    for _ in range(calls + 1):
        for i, function in enumerate(functions):
            start = time.thread_time()
            function()
            best[i] = min(best[i], time.thread_time() - start)
    return best


def measure(d: int, dtype: torch.dtype) -> dict[str, float | str]:
    """A row."""
    A = torch.randn(d, d, dtype=dtype)
    calls = max(2, min(100, round(WORK / (16 / 3 * d**3))))
    plain, apart = least(calls, lambda: decomposed(A), lambda: padded(A, ALIGNED))
    found = {"d": d, "dtype": str(dtype).removeprefix("torch."), "plain_ms": 1e3 * plain, "padded_ms": 1e3 * apart}
    return found | {"ratio": apart / plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.float64):
        for d in args.sizes:
            rows.append(measure(d, dtype))
            print("{dtype} {d:5d} {plain_ms:9.3f} ms {padded_ms:9.3f} ms {ratio:5.2f}".format(**rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"padding_rows": ALIGNED, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
