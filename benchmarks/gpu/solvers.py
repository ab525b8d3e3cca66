"""What a refresh costs by solver, size, batch and precision, and how good its basis is; by `refresh.solve`."""

from __future__ import annotations

import refresh
import torch
from timing import milliseconds

from gpu.record import Record
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.solvers import SOLVERS

EVERY = 10
SIZES = ((768, 1), (768, 12), (2048, 1), (512, 16), (2304, 12), (2048, 16), (3072, 12), (8192, 1))
"""Sides and batches of GPT-2's stacks, Llama 1B's, and lone matrices."""
LARGE = 1e11
"""Entries cubed from which eigh takes too long, so that bases start anywhere and only times mean anything."""
PACE = 2e-11
"""Seconds of a solver per cubed side; decompositions on a GPU are slow."""


def run(record: Record) -> None:
    """Record a row for each solver, size and precision; and the time of a first basis, by eigh in float64."""
    rows = record.figures["rows"] = []
    first = record.figures["eigh in float64, ms"] = {}
    for d, batch in ((16, 2), (24, 1)) if record.tiny else SIZES:
        large = batch * d**3 > LARGE
        solvers = {name: follow for name, follow in SOLVERS.items() if not (large and name == "eigh")}
        for precision in ("high", "highest"):
            what = f"{batch} of {d}, {precision}"
            if record.fits(what, 3 * len(solvers) * PACE * batch * d**3):
                start = _orthonormal if large else eigenvectors
                with fp32_matmul_precision(precision):
                    found = refresh.solve(d, EVERY, 1 if record.tiny else 2, batch, record.device.type, solvers, start)
                rows += [{"precision": precision, "batch": batch} | row for row in found]
                record.write()
        if d not in first and record.fits(f"eigh in float64 of {d}", 10 * PACE * d**3):
            K = next(refresh.drifting(d, 1, EVERY, record.device.type))
            first[d] = milliseconds(lambda K=K: eigenvectors(K, force_double=True), record.device, repeats=1, lasts=0.0)


def _orthonormal(K: torch.Tensor) -> torch.Tensor:
    """Return some basis for each matrix of a batch."""
    return torch.linalg.qr(torch.randn_like(K[0])).Q.expand_as(K).clone()
