"""Time calls on a CPU, by this thread's CPU time, or on a GPU, by events in its stream."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the seconds of so many calls."""
    if device.type != "cuda":
        start = time.thread_time()
        for _ in range(calls):
            work()
        return max(time.thread_time() - start, 1e-9)
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def enough(work: Callable[[], object], device: torch.device, lasts: float) -> int:
    """Return how many calls last so many seconds, so that launches and the clock don't count. The first compiles."""
    work()
    return max(1, min(1000, math.ceil(lasts / seconds(work, device))))


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 5, lasts: float = 0.01) -> float:
    """Return the median milliseconds of a call, over several timings of as many calls as take ``lasts`` seconds."""
    calls = enough(work, device, lasts)
    return 1e3 * statistics.median(seconds(work, device, calls) / calls for _ in range(repeats))
