"""What is kept of the latest step, by reference; nothing is computed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steepest.engine import phases
from steepest.engine.roster import Roster
from steepest.exchange.bucket import Bucket, Move


class Watch:
    """What is kept of the latest step: references to its moves, its learning rates, and marks if it is timed."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.rates: list[float | Tensor] = []
        self.roster: Roster | None = None
        self.timed = False
        self.timeline: phases.Timeline[Any] | None = None

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
