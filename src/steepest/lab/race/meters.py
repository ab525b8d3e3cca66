"""Meters of time and memory. None of them changes what it measures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
