"""Measure time, phases and memory of optimizers that step in turn, in one process, on the same gradients."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from steepest.engine.phases import Timeline, install, listening
from steepest.lab.bench.entrants import Entrant
from steepest.lab.shared.errors import one_line

SEED = 0
QUIET = "6"
"""The level above all messages of Kineto, which would report every profile on stderr."""


@dataclass
class Measured:
    """The figures of one entrant, as far as it came."""

    entrant: Entrant
    cpu: list[float] = field(default_factory=list)
    """Seconds of CPU time of this thread, by step."""
    wall: list[float] = field(default_factory=list)
    """Seconds of wall time, by step; on a GPU until its work is done."""
    phases: list[Mapping[str, float]] = field(default_factory=list)
    """Seconds of each phase, by step: CPU time on a CPU, time of the stream on a GPU."""
    state_bytes: int = 0
    held_bytes: int = 0
    """The bytes that construction and warm-up left allocated."""
    peak_bytes: int = 0
    """The most bytes allocated at once since before construction, without weights and gradients."""
    error: str = ""
    """The exception that ended its part, in one line."""
    on_gpu: bool = False

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step by the clock that counts: CPU time on a CPU, wall time on a GPU."""
        return self.wall if self.on_gpu else self.cpu

    @property
    def mean(self) -> float:
        """The mean seconds of a step; NaN if it failed."""
        return fmean(self.seconds) if self.seconds and not self.error else math.nan

    def phase_means(self) -> dict[str, float]:
        """Return the mean milliseconds of each phase over all steps."""
        names = dict.fromkeys(name for step in self.phases for name in step)
        return {name: 1e3 * fmean(step.get(name, 0.0) for step in self.phases) for name in names}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, quantiles and maximum of step times in milliseconds, and the ratio of maximum and mean.

    >>> summary([0.001, 0.001, 0.001, 0.005])
    {'mean': 2.0, 'p50': 1.0, 'p95': 5.0, 'max': 5.0, 'max_over_mean': 2.5}
    """
    ordered = sorted(1e3 * s for s in seconds)
    mean, p95 = fmean(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"mean": mean, "p50": median(ordered), "p95": p95, "max": ordered[-1], "max_over_mean": ordered[-1] / mean}


def measure(
    entrants: Sequence[Entrant],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    steps: int,
    warmup: int,
    progress: Callable[[str], None] = lambda what: None,
    late: Callable[[], bool] = lambda: False,
) -> list[Measured]:
    """Let every entrant take ``warmup + steps`` steps. One that raises is out, and the others go on.

    Args:
        entrants: the optimizers that step in turn.
        shapes: the matrices; weights are zeros, gradients are normal and drawn anew for each step.
        device: the device of weights and gradients.
        steps: the number of timed steps, a multiple of every entrant's frequency.
        warmup: the number of steps before these, in which memory is watched instead of time.
        progress: is told what goes on.
        late: whether time is up. If so, timed steps end with a whole period of refreshes, and a warm-up is given up.
    """
    install()  # marks put around functions later would have graphs of torch.compile made anew
    runs = []
    for entrant in entrants:
        progress(f"{entrant.label} is made")
        runs.append(_Run(entrant, shapes, device))
    generator = torch.Generator(device).manual_seed(SEED)
    grads = [torch.empty(shape, device=device) for shape in shapes]
    copies = [torch.empty_like(grad) for grad in grads]
    period = math.lcm(*(max(1, entrant.family.frequency) for entrant in entrants))
    for step in range(warmup + steps):
        if late() and (step <= warmup or (step - warmup) % period == 0):
            break
        for grad in grads:
            grad.normal_(generator=generator)
        first = step % len(runs)  # no entrant always follows the same one
        for run in runs[first:] + runs[:first]:
            if not run.found.error:
                progress(f"step {step + 1} of {warmup + steps}: {run.found.entrant.label}")
                torch._foreach_copy_(copies, grads)
                run.step(copies, timed=step >= warmup)
    return [run.finish() for run in runs]


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state, at whatever depth.

    >>> state_bytes({0: {"exp_avg": torch.zeros(2, 3), "deeper": [torch.zeros(1)], "step": 5}})
    28
    """
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(state_bytes, state.values()))
    return sum(map(state_bytes, state)) if isinstance(state, list | tuple) else 0


class _Run:
    """The weights and the optimizer of one entrant, and the figures of its steps."""

    def __init__(self, entrant: Entrant, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.found = Measured(entrant, on_gpu=device.type == "cuda")
        self.device = device
        self.params: list[torch.nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None
        with self._attempt():
            self.params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
            with self._watched():
                self.optimizer = entrant.make(self.params)

    def step(self, grads: Sequence[Tensor], timed: bool) -> None:
        """Take one step on these gradients, which the optimizer may change."""
        assert self.optimizer is not None
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        with self._attempt():
            if timed:
                self._timed(self.optimizer)
            else:
                with self._watched():
                    self.optimizer.step()
        for p in self.params:
            p.grad = None

    def finish(self) -> Measured:
        """Free the optimizer, and return the figures."""
        if self.optimizer is not None:
            self.found.state_bytes = state_bytes(self.optimizer.state)
        if not self.found.wall:
            self.found.error = self.found.error or "time was up before its first timed step"
        self.optimizer, self.params = None, []
        return self.found

    def _timed(self, optimizer: torch.optim.Optimizer) -> None:
        on_gpu = self.found.on_gpu
        timeline: Timeline[Any] = Timeline(_event if on_gpu else time.thread_time)
        self._wait()
        wall, cpu = time.perf_counter(), time.thread_time()
        with listening(timeline):
            optimizer.step()
        cpu = time.thread_time() - cpu
        self._wait()
        self.found.wall.append(time.perf_counter() - wall)
        self.found.cpu.append(cpu)
        self.found.phases.append(timeline.spent(_seconds_between if on_gpu else lambda start, end: end - start))

    def _wait(self) -> None:
        if self.found.on_gpu:
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Enter the entrant's scope. An exception, also of the scope itself, ends its part and frees its memory."""
        try:
            with self.found.entrant.scope():
                yield
        except Exception as error:
            self.found.error = one_line(error)
            self.optimizer, self.params = None, []

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Follow allocations: by torch's profiler on a CPU, by the allocator's own peak on a GPU."""
        found = self.found
        if found.on_gpu:
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            peak = torch.cuda.max_memory_allocated(self.device)
            found.peak_bytes = max(found.peak_bytes, found.held_bytes + peak - before)
            found.held_bytes += torch.cuda.memory_allocated(self.device) - before
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
            yield
        kineto = profiled.profiler.kineto_results
        memory = [(event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]"]
        for _, change in sorted(memory):
            found.held_bytes += change
            found.peak_bytes = max(found.peak_bytes, found.held_bytes)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds_between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
