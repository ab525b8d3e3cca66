"""A section of gpu.py: what a refresh costs by solver, size, batch and precision, and how good the basis is then."""

from __future__ import annotations

import statistics
from typing import Any

import refresh
import torch
from gpu_job import Job, free
from torch import Tensor

from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.solvers import SOLVERS

EVERY = 10
"""Steps from refresh to refresh, in which the matrices drift."""
SIZES = ((768, 12), (2304, 12), (3072, 12), (512, 16), (2048, 16), (8192, 1), (768, 1), (2048, 1))
"""Sides and batches: GPT-2's stacks, Llama 1B's, and lone matrices."""
GROWTH = 2.5
"""Of times with size, as they are expected: cubes in the limit, less where launches count."""
BY_PRODUCTS = ("cholesky", "first_order")
"""Solvers that TF32 can speed up."""


def measure(job: Job) -> None:
    """A row for each solver and precision at each size; for eigh in float64, by which a basis starts, just its time."""
    rows: list[dict[str, Any]] = job.figures.setdefault("rows", [])
    pace: dict[str, float] = {}
    for d, batch in ((16, 2), (24, 1)) if job.tiny else SIZES:
        if not job.fits(f"matrices {batch} × {d}", 5e-12 * batch * d**3):
            continue
        drifting = refresh.drifting(d, batch, EVERY, job.device.type)
        Ks = [next(drifting) for _ in range(2 if job.tiny else 3)]
        work = batch * float(d) ** GROWTH
        decomposed = job.fits(f"a basis of {batch} × {d} by eigh", 3e-3 * pace.get("eigh high", 0.0) * work)
        start = eigenvectors(Ks[0]) if decomposed else _orthonormal(d, batch, job.device)
        ways = [(name, "high") for name in SOLVERS] + [(name, "highest") for name in BY_PRODUCTS]
        for name, precision in ways:
            key, used = f"{name} {precision}", Ks[:2] if name == "eigh" else Ks
            if not job.fits(f"{key} at {batch} × {d}", 1e-3 * len(used) * pace.get(key, 0.0) * work):
                continue
            with fp32_matmul_precision(precision):
                row = _solve(job, name, used, start)
            if not decomposed:  # from any basis to one that diagonalizes is a long way: only the time counts
                del row["off_diagonal"]
            rows.append({"solver": name, "precision": precision, "d": d, "batch": batch, **row})
            pace[key] = row["ms"] / work
        if job.fits(f"eigh in float64 at {d}", 2e-3 * pace.get("float64", 0.0) * d**GROWTH):
            for _ in range(2):  # the first warms up
                _, ms = refresh.timed(lambda K=Ks[0][:1]: eigenvectors(K, force_double=True), job.device.type)  # type: ignore[misc]
            pace["float64"] = ms / d**GROWTH
            rows.append({"solver": "eigh", "precision": "float64", "d": d, "batch": 1, "ms": ms})
        job.keep()
        del Ks, start
        free(job.device)


def _solve(job: Job, name: str, Ks: list[Tensor], Q: Tensor) -> dict[str, float]:
    """Median milliseconds of a refresh of the whole batch; off the diagonal, and how far from orthonormal, at last."""
    times = []
    for K in Ks:  # the first warms up
        (Q, _), ms = refresh.timed(lambda Q=Q, K=K: SOLVERS[name](K, Q, 1), job.device.type)  # type: ignore[misc]
        times.append(ms)
    gram = Q[0].mT.double() @ Q[0].double()
    error = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
    off = refresh.off_diagonal(Ks[-1].double(), Q.double())
    return {"ms": statistics.median(times[1:]), "off_diagonal": off, "orthogonality": error}


def _orthonormal(d: int, batch: int, device: torch.device) -> Tensor:
    A = torch.randn(d, d, generator=torch.Generator(device).manual_seed(0), device=device)
    return torch.linalg.qr(A).Q.expand(batch, d, d).clone()
