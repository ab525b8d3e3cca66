"""Whether a device multiplies bfloat16 faster than float32, measured once per process and device."""

from __future__ import annotations

import time
from functools import cache

import torch

MARGIN = 1.5
"""bfloat16 pays if it is at least so many times as fast: further from 1 than noise makes the ratio of equal times."""
GLANCE, SIDE = 64, 256
"""Sides of the products that are timed: first one that is cheap on any machine, then one that is long enough."""
HOPELESS = 8.0
"""Where the small product takes so many times as long in bfloat16, the large one is not tried."""


@cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether products in bfloat16 take at most two thirds of the time of float32's on this device.

    GPUs of compute capability 8.0 and up have units for it, and are not measured; other accelerators are taken to have
    none. On a CPU it depends: with such units bfloat16 is twice as fast, without them up to 60 times as slow, and no
    public function of torch tells which. Products in both dtypes are timed in turn, on one thread, and the shortest
    time of each counts: whatever else the machine does can only lengthen one. It takes about 10 ms.

    >>> bfloat16_pays(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ratio is to be the processor's, not that of what it costs to share a small product
    try:
        return _speedup(GLANCE, rounds=5) > 1 / HOPELESS and _speedup(SIDE, rounds=15) >= MARGIN
    finally:
        torch.set_num_threads(threads)


def _speedup(side: int, rounds: int) -> float:
    """How many times as fast a square product on the CPU is in bfloat16, at best of each."""
    fine, coarse = (torch.ones(side, side, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16))
    times = [(_seconds(fine), _seconds(coarse)) for _ in range(rounds)]
    return min(slow for slow, _ in times) / min(fast for _, fast in times)


def _seconds(X: torch.Tensor) -> float:
    start = time.perf_counter()
    X @ X
    return time.perf_counter() - start
