"""What is kept of the latest step; beside copies, nothing is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steepest.engine import phases
from steepest.engine.roster import Roster
from steepest.exchange.bucket import Bucket, Move


class Watch:
    """What is kept of the latest step: moves with copies of directions, learning rates, and marks if it is timed."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.rates: list[float | Tensor] = []
        self.roster: Roster | None = None
        self.timed = False
        self.timeline: phases.Timeline[Any] | None = None

    def note(self, moves: Sequence[Move]) -> None:
        """Keep moves with copies of their directions, which the step uses up."""
        for move in moves:
            if move.staying is not None:
                move.staying.zero()
        copies = torch._foreach_mul([move.D for move in moves], 1.0)
        self.moves += [replace(move, D=D) for move, D in zip(moves, copies, strict=True)]

    @contextmanager
    def watching(self, buckets: Sequence[Bucket]) -> Iterator[None]:
        """Forget the step before, and time the one in the ``with`` block if that is wanted."""
        self.moves, self.rates, self.timeline = [], [], None
        if not self.timed or phases.is_listening():
            yield
            return
        on_gpu = any(bucket.device.type == "cuda" for bucket in buckets)
        self.timeline = phases.Timeline(_event if on_gpu else time.perf_counter)
        with phases.listening(self.timeline):
            yield

    def times(self) -> dict[str, float]:
        """Return the milliseconds of each phase, once the device has finished the step."""
        if self.timeline is None:
            return {}
        last = self.timeline.marks[-1][1]
        if isinstance(last, float):
            spent = self.timeline.spent(lambda start, end: 1e3 * (end - start))
        else:
            last.synchronize()
            spent = self.timeline.spent(lambda start, end: start.elapsed_time(end))
        return {f"time/{name}": x for name, x in spent.items()}


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
