"""Meters of time, memory, update sizes and condition numbers. None of them changes what it measures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COVARIANCES = ("L", "R")
LARGEST = 1024
"""Size of the largest matrix that is decomposed; a larger one would take longer than the step that is watched."""


def stopwatch(model: nn.Module) -> tuple[str, Callable[[], float]]:
    """Return the name of a clock for training ``model``, and the clock.

    On a CPU it is this thread's CPU time, which other processes do not disturb. On an accelerator, which works
    asynchronously, it is elapsed time once all its work is done.
    """
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if not devices:
        return "CPU time", time.thread_time

    def elapsed() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return "time", elapsed


def peak_memory() -> int:
    """Return this process's largest resident memory so far, in bytes; 0 where the system does not tell."""
    if sys.platform == "linux":  # getrusage would include the parent's memory, whose mark exec inherits
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))


class UpdateMeter:
    """Measures the root mean square by which one step changes each matrix, in learning rates."""

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        self.matrices = list(matrices.values())
        self.before = [W.detach().clone() for W in self.matrices]

    def read(self, lr: float) -> tuple[float, float]:
        """Return the median over matrices, and the largest."""
        pairs = zip(self.matrices, self.before, strict=True)
        rms = [(W.detach() - old).square().mean().sqrt().item() / lr for W, old in pairs]
        return (median(rms), max(rms)) if rms else (0.0, 0.0)


def weight_spread(matrices: Mapping[str, Tensor]) -> float | None:
    """Return the ratio of the largest to the median singular value, median over matrices; None without matrices.

    The smallest singular value of a square matrix is so close to zero that a ratio to it would mostly be chance.
    """
    weights = [W.detach().flatten(1).double() for W in matrices.values()]
    spectra = [torch.linalg.svdvals(W) for W in weights if _is_decomposable(W)]
    return median((s[0] / s.median()).item() for s in spectra) if spectra else None


def factor_condition(optimizer: Optimizer) -> float | None:
    """Return the median condition number of the covariances in the optimizer's state; None without covariances.

    The smallest eigenvalue counts as no smaller than rounding errors of the largest.
    """
    factors = [state[name] for state in optimizer.state.values() for name in COVARIANCES if name in state]
    spectra = [torch.linalg.eigvalsh(K.double()) for K in factors if _is_decomposable(K)]  # [..., d], ascending
    limit = 1 / torch.finfo(torch.float32).eps
    ratios = [ratio for s in spectra for ratio in (s[..., -1] / s[..., 0]).flatten().tolist()]
    return median(ratio if 0 < ratio < limit else limit for ratio in ratios) if ratios else None


def _is_decomposable(A: Tensor) -> bool:
    """Return whether a decomposition is fast enough and does not raise, as it would after a run has diverged."""
    return max(A.shape) <= LARGEST and bool(A.isfinite().all())
