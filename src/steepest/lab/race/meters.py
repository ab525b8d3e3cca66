"""Instruments: time, memory, the size of updates, and condition numbers. None of them changes what it measures."""

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
LARGEST = 1024  # a decomposition of a larger matrix would take longer than the step that it watches


def stopwatch(model: nn.Module) -> tuple[str, Callable[[], float]]:
    """A clock for training ``model``, and what it shows.

    On a CPU it is this thread's CPU time, which other processes don't disturb; an accelerator works on its own, so
    there it is the time of day once all its work is done.
    """
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if not devices:
        return "CPU time", time.thread_time

    def elapsed() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return "time", elapsed


def peak_memory() -> int:
    """The most memory that this process has had resident so far, in bytes; 0 where that can't be told."""
    if sys.platform == "linux":  # getrusage would count the parent's memory too: exec inherits its mark
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def state_bytes(optimizer: Optimizer) -> int:
    """What the optimizer remembers, in bytes of tensors."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))


class UpdateMeter:
    """How far one step moves each matrix: the root mean square of the change, in learning rates."""

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        self.matrices = list(matrices.values())
        self.before = [W.detach().clone() for W in self.matrices]

    def read(self, lr: float) -> tuple[float, float]:
        """The median over matrices, and the largest."""
        pairs = zip(self.matrices, self.before, strict=True)
        rms = [(W.detach() - old).square().mean().sqrt().item() / lr for W, old in pairs]
        return (median(rms), max(rms)) if rms else (0.0, 0.0)


def weight_spread(matrices: Mapping[str, Tensor]) -> float | None:
    """Largest over median singular value, the median of all matrices.

    Not over the smallest one: that of a square matrix is so close to zero that the ratio is mostly chance.
    """
    weights = [W.detach().flatten(1).double() for W in matrices.values()]
    spectra = [torch.linalg.svdvals(W) for W in weights if _can_be_decomposed(W)]
    return median((s[0] / s.median()).item() for s in spectra) if spectra else None


def factor_condition(optimizer: Optimizer) -> float | None:
    """Median condition number of the covariances in the optimizer's state, or None without any.

    A smallest eigenvalue that is lost in rounding counts as rounding.
    """
    factors = [state[name] for state in optimizer.state.values() for name in COVARIANCES if name in state]
    spectra = [torch.linalg.eigvalsh(K.double()) for K in factors if _can_be_decomposed(K)]  # [..., d], ascending
    limit = 1 / torch.finfo(torch.float32).eps
    ratios = [ratio for s in spectra for ratio in (s[..., -1] / s[..., 0]).flatten().tolist()]
    return median(ratio if 0 < ratio < limit else limit for ratio in ratios) if ratios else None


def _can_be_decomposed(A: Tensor) -> bool:
    """In reasonable time, and at all: a decomposition of a run that has just broken down would raise."""
    return max(A.shape) <= LARGEST and bool(A.isfinite().all())
