"""Time, phases and memory of optimizers that take their steps alternately, in one process, on the same gradients."""

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

from steepest.engine.phases import Timeline, listening
from steepest.lab.bench.entrants import Entrant
from steepest.lab.shared.errors import one_line

SEED = 0
QUIET = "6"
"""The level above all of Kineto's messages, which would announce every profile on stderr."""


@dataclass
class Measured:
    """One entrant, as far as it came."""

    entrant: Entrant
    cpu: list[float] = field(default_factory=list)
    """Seconds of this thread's CPU time, by step."""
    wall: list[float] = field(default_factory=list)
    """Seconds of the time of day, by step; on a GPU until its work was done."""
    phases: list[Mapping[str, float]] = field(default_factory=list)
    """Seconds of every phase, by step, in `seconds`' own clock on a CPU, on the device's on a GPU."""
    state_bytes: int = 0
    held_bytes: int = 0
    """What construction and warm-up left allocated."""
    peak_bytes: int = 0
    """The most that was allocated at once since before construction; weights and gradients don't count."""
    error: str = ""
    """What it raised."""
    on_gpu: bool = False

    @property
    def seconds(self) -> list[float]:
        """Of every step, by the clock that counts: CPU time on a CPU, the time of day on a GPU."""
        return self.wall if self.on_gpu else self.cpu

    @property
    def mean(self) -> float:
        """Seconds of a step; NaN if it failed."""
        return fmean(self.seconds) if self.seconds and not self.error else math.nan

    def phase_means(self) -> dict[str, float]:
        """Seconds of every phase, over all steps."""
        names = dict.fromkeys(name for step in self.phases for name in step)
        return {name: fmean(step.get(name, 0.0) for step in self.phases) for name in names}


def summary(times: Sequence[float]) -> dict[str, float]:
    """What a column shows of times.

    >>> summary([1.0, 1.0, 1.0, 5.0])
    {'mean': 2.0, 'p50': 1.0, 'p95': 5.0, 'max': 5.0, 'max_over_mean': 2.5}
    """
    ordered, mean = sorted(times), fmean(times)
    return {
        "mean": mean,
        "p50": median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
        "max_over_mean": ordered[-1] / mean,
    }


def measure(
    crew: Sequence[Entrant],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    steps: int,
    warmup: int,
    news: Callable[[str], None] = lambda what: None,
) -> list[Measured]:
    """Have everybody step ``warmup + steps`` times; who raises is out, and the others go on.

    Args:
        crew: who.
        shapes: of the matrices; weights are zeros, gradients normal, drawn anew for each step.
        device: where.
        steps: that are timed.
        warmup: steps before, in which memory is watched, and not the time.
        news: hears what goes on.
    """
    places = [_Place(entrant, shapes, device) for entrant in crew]
    for place in places:
        news(f"{place.found.entrant.label} is made")
        place.make()
    generator = torch.Generator(device).manual_seed(SEED)
    grads = [torch.empty(shape, device=device) for shape in shapes]
    copies = [torch.empty_like(grad) for grad in grads]
    for step in range(warmup + steps):
        for grad in grads:
            grad.normal_(generator=generator)
        first = step % len(places)  # nobody always follows the same
        for place in places[first:] + places[:first]:
            if not place.found.error:
                news(f"step {step + 1} of {warmup + steps}: {place.found.entrant.label}")
                torch._foreach_copy_(copies, grads)
                place.step(copies, timed=step >= warmup)
    return [place.done() for place in places]


def state_bytes(state: Any) -> int:
    """Of all tensors in a state, however deep they lie.

    >>> state_bytes({0: {"exp_avg": torch.zeros(2, 3), "deeper": [torch.zeros(1)], "step": 5}})
    28
    """
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(state_bytes(value) for value in state.values())
    return sum(map(state_bytes, state)) if isinstance(state, list | tuple) else 0


class _Place:
    """Where one entrant steps: its weights, its optimizer, and what was measured of it."""

    def __init__(self, entrant: Entrant, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.found = Measured(entrant, on_gpu=device.type == "cuda")
        self.device, self.shapes = device, shapes
        self.params: list[torch.nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def make(self) -> None:
        """Its optimizer."""

        def make() -> None:
            self.params = [torch.nn.Parameter(torch.zeros(shape, device=self.device)) for shape in self.shapes]
            with self._watched():
                self.optimizer = self.found.entrant.make(self.params)

        self._attempt(make)

    def step(self, grads: Sequence[Tensor], timed: bool) -> None:
        """One step on these gradients, which may be changed by it."""
        optimizer = self.optimizer
        assert optimizer is not None
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

        def step() -> None:
            if timed:
                self._timed(optimizer)
            else:
                with self._watched():
                    optimizer.step()

        self._attempt(step)
        for p in self.params:
            p.grad = None

    def done(self) -> Measured:
        """What was found; the optimizer goes."""
        if self.optimizer is not None:
            self.found.state_bytes = state_bytes(self.optimizer.state)
        self.optimizer, self.params = None, []
        return self.found

    def _timed(self, optimizer: torch.optim.Optimizer) -> None:
        timeline: Timeline[Any] = Timeline(_event if self.found.on_gpu else time.thread_time)
        self._wait()
        wall, cpu = time.perf_counter(), time.thread_time()
        with listening(timeline):
            optimizer.step()
        mine = time.thread_time() - cpu
        self._wait()
        self.found.wall.append(time.perf_counter() - wall)
        self.found.cpu.append(mine)
        self.found.phases.append(timeline.spent(_seconds_between if self.found.on_gpu else lambda a, b: b - a))

    def _wait(self) -> None:
        if self.found.on_gpu:
            torch.cuda.synchronize(self.device)

    def _attempt(self, work: Callable[[], None]) -> None:
        """Work within the entrant's scope; an exception, the scope's too, ends its part, and frees what it held."""
        try:
            with self.found.entrant.scope():
                work()
        except Exception as error:
            self.found.error = one_line(error)
            self.optimizer, self.params = None, []

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Follow allocations: by torch's profiler on a CPU, by the allocator's own marks on a GPU."""
        found = self.found
        if found.on_gpu:
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            found.peak_bytes = max(
                found.peak_bytes, found.held_bytes + torch.cuda.max_memory_allocated(self.device) - before
            )
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
