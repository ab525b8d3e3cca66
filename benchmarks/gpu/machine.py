"""The machine: its names and versions, and how fast it multiplies, copies and launches."""

from __future__ import annotations

import platform
import subprocess

import torch
from timing import milliseconds

from gpu.record import Record
from steepest.lab.listing.check import versions
from steepest.lab.shared.fingerprints import machine
from steepest.linalg.precision import fp32_matmul_precision

PACKAGES = ("torch", "triton", "numpy", "heavyball", "pytorch_optimizer")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
"""The fields to ask nvidia-smi for."""
PRECISIONS = {"float32": "highest", "tf32": "high", "bfloat16": "highest"}
"""Ways to multiply, with torch's switch for float32."""


def run(record: Record) -> None:
    """Record names and versions, TFLOP/s of products, GB/s of copies, and the microseconds of a launch."""
    device = record.device
    record.figures["environment"] = {"processor": machine(), "python": platform.python_version(), **versions(*PACKAGES)}
    if record.cuda:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", f"--id={device.index or 0}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        record.figures["environment"] |= {"cuda": torch.version.cuda, QUERY: done.stdout.strip()}
    record.figures["products, TFLOP/s"] = products = []
    spent = 0.0
    for d in (32, 48) if record.tiny else (768, 1024, 2048, 3072, 4096, 8192):
        if record.fits(f"products of {d}", 8 * spent):
            start = record.clock()
            products.append({"d": d} | {precision: _product(d, precision, device) for precision in PRECISIONS})
            spent = record.clock() - start
            record.write()
    record.figures["copies, GB/s"] = {
        f"{size >> 10} KiB": _copy(size, device) for size in ((2**16, 2**18) if record.tiny else (2**24, 2**28, 2**31))
    }
    x = torch.zeros(1, device=device)
    record.figures["launch, µs"] = 1e3 * milliseconds(lambda: x.add_(1), device)


def _product(d: int, precision: str, device: torch.device) -> float:
    """Measure TFLOP/s of ``[d, d] [d, d]``."""
    X = torch.randn(d, d, device=device).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    out = torch.empty_like(X)
    with fp32_matmul_precision(PRECISIONS[precision]):
        return 2 * d**3 / milliseconds(lambda: torch.mm(X, X, out=out), device) / 1e9


def _copy(size: int, device: torch.device) -> float:
    """Measure GB/s, read and written, of a copy of so many bytes."""
    x = torch.zeros(size // 4, device=device)
    y = torch.empty_like(x)
    return 2 * size / milliseconds(lambda: y.copy_(x), device) / 1e6
