"""How far the Newton-Schulz iterations end from exact ones, by dtype, and what they cost.

    python benchmarks/polar.py                  # errors of each table, half a minute
    python benchmarks/polar.py --times          # CPU times of float32's forms, with one and with two Gram matrices

A matrix is made of random singular vectors and of singular values from 1 down to 1/condition. The error is the spectral
norm of the difference from what the table's polynomials make of each singular value in exact arithmetic; the columns
show the largest of three condition numbers (10, 1e3, 1e6) for each ratio of sides. deepseekv4 repeats a polynomial that
throws neighbouring numbers apart within its band, so its errors say little. GFLOP is what a matrix of 1024 rows takes.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from steepest.linalg import polar
from steepest.linalg.polar import TABLES, polar_factor
from steepest.rule.work import counted

ROWS, ASPECTS, CONDITIONS = 96, (1, 2, 3, 4, 16), (1e1, 1e3, 1e6)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decomposed(m: int, n: int, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, m, dtype=torch.float64, generator=generator)).Q for d in (m, n))
    return U, torch.logspace(0, -math.log10(condition), m, dtype=torch.float64), V


def error(name: str, dtype: torch.dtype, aspect: int, condition: float) -> float:
    U, sigma, V = decomposed(ROWS, ROWS * aspect, condition)
    exact = sigma / (TABLES[name].safety * sigma.norm())
    for a, b, c in TABLES[name].steps:
        exact = a * exact + b * exact**3 + c * exact**5
    O = polar_factor(((U * sigma) @ V.mT).float(), name, eps=0.0, dtype=dtype)
    return torch.linalg.matrix_norm(O.double() - (U * exact) @ V.mT, 2).item()


def gigaflops(name: str, dtype: torch.dtype, aspect: int) -> float:
    G = torch.empty(1024, 1024 * aspect, device="meta")
    return counted(lambda: polar_factor(G, name, dtype=dtype)).total / 1e9


def errors() -> None:
    print(f"{'table':20}{'dtype':10}" + "".join(f"{f'1:{aspect}':>16}" for aspect in ASPECTS))
    for name, table in TABLES.items():
        for dtype in DTYPES if table.half else DTYPES[-1:]:
            cells = [
                f"{max(error(name, dtype, aspect, c) for c in CONDITIONS):.1e} {gigaflops(name, dtype, aspect):6.0f}"
                for aspect in ASPECTS
            ]
            print(f"{name:20}{str(dtype).removeprefix('torch.'):10}" + "".join(f"{cell:>16}" for cell in cells))
    print("each cell: error, GFLOP")


def times() -> None:
    torch.set_num_threads(1)
    first = polar.GRAM_STEPS
    for rows in (256, 768):
        for aspect in (2, 4, 8):
            G, seconds = torch.randn(rows, rows * aspect), {5: [], 2: []}
            for _ in range(12):
                for polar.GRAM_STEPS, taken in seconds.items():
                    start = time.process_time()
                    polar_factor(G)
                    taken.append(time.process_time() - start)
            ratio = min(seconds[2]) / min(seconds[5])
            print(f"{rows}x{rows * aspect}: a Gram matrix every 2 steps takes {ratio:.2f} of the time of one in 5")
    polar.GRAM_STEPS = first


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="time float32's forms instead")
    times() if parser.parse_args().times else errors()
