"""A measurement of whether a device multiplies bfloat16 faster than float32, once per process and device."""

from __future__ import annotations

import time
from functools import cache

import torch

MARGIN = 1.5
"""The speedup from which bfloat16 is used, further from 1 than noise in the measurement."""
SMALL, LARGE = 64, 256
"""The sides of the two products that are timed: the small one is cheap on any machine, the large one long enough."""
HOPELESS = 8.0
"""The slowdown of the small product in bfloat16 from which the large one is not timed."""


@cache
def bfloat16_pays(device: torch.device) -> bool:
    """Return whether products in bfloat16 take at most two thirds of the time of float32's on this device.

    GPUs of compute capability 8.0 and up have units for bfloat16, and other accelerators are assumed to have none;
    neither is measured. A CPU with such units is twice as fast in bfloat16, one without them up to 60 times as slow,
    and no public function of torch tells which. Products in both dtypes are timed in turn, on one thread, and the
    shortest time of each counts, since other work on the machine only lengthens times. This takes about 10 ms.

    >>> bfloat16_pays(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the cost of sharing a small product among threads does not count
    try:
        return _speedup(SMALL, rounds=5) > 1 / HOPELESS and _speedup(LARGE, rounds=15) >= MARGIN
    finally:
        torch.set_num_threads(threads)


def _speedup(side: int, rounds: int) -> float:
    """The shortest time of a square product on the CPU in float32, divided by the shortest in bfloat16."""
    X, Y = (torch.ones(side, side, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16))
    times = [(_seconds(X), _seconds(Y)) for _ in range(rounds)]
    return min(float32 for float32, _ in times) / min(bfloat16 for _, bfloat16 in times)


def _seconds(X: torch.Tensor) -> float:
    start = time.perf_counter()
    X @ X
    return time.perf_counter() - start
