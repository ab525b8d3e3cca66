"""The first section of gpu.py: which machine this is, and how fast it multiplies and copies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch
from gpu_job import Job, milliseconds

from steepest.lab.shared.fingerprints import machine
from steepest.linalg.precision import fp32_matmul_precision

PACKAGES = ("torch", "triton", "numpy", "heavyball", "pytorch_optimizer", "rich")
ASKED = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.limit", "temperature.gpu"),
)
"""Of nvidia-smi."""
PRECISIONS = {
    "float32": ("highest", torch.float32),
    "tf32": ("high", torch.float32),
    "medium": ("medium", torch.float32),
    "bfloat16": ("highest", torch.bfloat16),
}
"""How products are computed, by name: torch's switch for float32, and the dtype."""


def measure(job: Job) -> None:
    """Names and versions; FLOPs per second of products, bytes per second of copies, microseconds of a launch."""
    job.figures["environment"] = environment(job.device)
    job.keep()
    rows: list[dict[str, Any]] = []
    job.figures["products"] = rows
    spent = 0.0
    sizes = (32, 48) if job.tiny else (768, 1024, 2048, 3072, 4096, 8192)
    for d in sizes:
        if not job.fits(f"products of {d}", 8 * spent):
            break
        start = job.clock()
        rows.append({"d": d} | products(d, job.device, job.tiny))
        spent = job.clock() - start
    job.figures["copies"] = [
        {"megabytes": size / 2**20, "gigabytes_per_second": bandwidth(size, job.device)}
        for size in ((2**16, 2**18) if job.tiny else (2**24, 2**28, 2**31))
        if job.fits(f"copies of {size >> 20} MiB")
    ]
    x = torch.zeros(1, device=job.device)
    job.figures["launch_us"] = 1e3 * milliseconds(lambda: x.add_(1), job.device)


def products(d: int, device: torch.device, tiny: bool) -> dict[str, float]:
    """TFLOP/s of ``[d, d] [d, d]`` in each precision; bfloat16 not on a CPU, which may take 60 times as long for it."""
    A = torch.randn(d, d, device=device)
    found = {}
    for name, (switch, dtype) in PRECISIONS.items():
        if dtype == torch.bfloat16 and device.type == "cpu" and not tiny:
            continue
        X = A.to(dtype)
        out = torch.empty_like(X)
        with fp32_matmul_precision(switch):
            ms = milliseconds(lambda X=X, out=out: torch.mm(X, X, out=out), device)  # type: ignore[misc]
        found[name] = 2 * d**3 / ms / 1e9
    return found


def bandwidth(size: int, device: torch.device) -> float:
    """GB/s, read and written, of a copy of so many bytes."""
    x = torch.zeros(size // 4, device=device)
    y = torch.empty_like(x)
    return 2 * size / milliseconds(lambda: y.copy_(x), device) / 1e6


def environment(device: torch.device) -> dict[str, Any]:
    """Names and versions."""
    found: dict[str, Any] = {
        "device": "cpu",
        "processor": machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda or "none",
        "kernels": os.environ.get("STEEPEST_KERNELS", "auto"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gib"] = properties.total_memory / 2**30
        found["multiprocessors"] = properties.multi_processor_count
        found["nvidia_smi"] = _nvidia_smi(device)
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nvidia_smi(device: torch.device) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(ASKED, (word.strip() for word in answer.strip().split(",")), strict=False))
