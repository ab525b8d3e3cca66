"""Meters of time and memory. None of them changes what it measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode


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


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made while it is entered, and alive at once; not a library's workspace.

    >>> with Allocations() as made:
    ...     x = torch.ones(1000)
    ...     y = x.reshape(10, 100).mul(2).sum()
    >>> made.peak  # x, twice x, and their sum
    8004
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}  # by storage: a weak reference, and bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note the memory that its results have and its arguments had not."""
        before = {reference.cdata for reference, _ in map(_memory, _tensors((args, kwargs)))}
        results = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        held = {reference.cdata: (reference, size) for reference, size in map(_memory, _tensors(results))}
        self._alive |= {key: held[key] for key in held.keys() - before}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return results


def _memory(x: Tensor) -> tuple[Any, int]:
    """Return a weak reference to a tensor's storage, and its bytes."""
    storage = x.untyped_storage()
    return StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]


def _tensors(x: object) -> Iterator[Tensor]:
    """Yield the tensors with memory in an operation's arguments or results, or in an optimizer's state."""
    if isinstance(x, Tensor):
        if x.layout == torch.strided and x.device.type != "meta":
            yield x
    elif isinstance(x, (list, tuple, dict)):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state, those in lists included."""
    return sum(value.numel() * value.element_size() for value in _tensors(list(optimizer.state.values())))
