"""Stacks: all matrices of one shape in one parameter group, held as one tensor ``[B, m, n]``.

A matrix's place in its stack is a slot. A stack is allocated once and persists; `torch.optim.Optimizer.state` holds
views into it. Each slot has two clocks: ``t``, on the device, counts the updates that a matrix has had, for bias
corrections; ``clock``, on the host, says where in its life it stands, for refreshes, without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from typing import Any as Solved

import torch
from torch import Tensor

from steepest.linalg.phases import phase
from steepest.rule import Rule, Slots, State, Step
from steepest.stack.graphs import Recorder
from steepest.stack.storage import Storage
from steepest.view import View

Windows = Mapping[tuple[int, int], Tensor]
"""By a parameter's position in its group and the number of a piece: what the piece covers of a tensor of its shape."""

Answers = Mapping[tuple[int, int], Mapping[str, Solved]]
"""By the same, what has been solved elsewhere for all of a piece's matrices, by the errand's name."""


@dataclass(frozen=True)
class Seat:
    """The slots ``start:stop`` of a stack that one piece of one parameter takes."""

    index: int
    """The parameter's position in its group."""
    piece: int
    """Which of the batches of the parameter's view."""
    start: int
    stop: int
    view: View
    first: int = 0
    """The number of its first matrix among those of the whole parameter, if this rank holds only some of them."""

    @property
    def key(self) -> tuple[int, int]:
        """The parameter's position and the number of its piece."""
        return self.index, self.piece

    @property
    def range(self) -> range:
        """The slots, one by one."""
        return range(self.start, self.stop)

    @property
    def slots(self) -> slice:
        """``start:stop``."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Run:
    """Neighbouring slots of a stack that are updated together: alive, and in the same stage."""

    slots: slice
    stage: str
    refresh: Slots | None
    """Which of them refresh, counted from the run's first."""
    due: Sequence[int]
    """The same as slots of the stack, on the host."""


@dataclass(frozen=True)
class PutOff:
    """What a rule has left of a step for after it, of neighbouring slots that refresh, all of them."""

    slots: slice
    step: Step
    """Of these slots alone."""
    finite: Tensor | None
    """``[b, 1, 1]``: of which matrices the step must leave no trace, as False; None: of none."""

    def of(self, seat: Seat, answers: Mapping[str, Solved]) -> PutOff | None:
        """What of it concerns a seat, if anything, with what has been solved for the matrices of that seat."""
        start, stop = max(self.slots.start, seat.start), min(self.slots.stop, seat.stop)
        if start >= stop:
            return None
        mine = slice(start - self.slots.start, stop - self.slots.start)
        solved = {name: tuple(x[start - seat.start : stop - seat.start] for x in xs) for name, xs in answers.items()}
        rest = put_off(self.step, mine, None if self.finite is None else self.finite[mine])
        return replace(rest, slots=slice(start, stop), step=replace(rest.step, solved=solved))


def put_off(step: Step, slots: slice, finite: Tensor | None) -> PutOff:
    """Of a step, what it leaves for after it of some slots, which all refresh; ``finite`` is of these already."""
    failures = None if step.failures is None else step.failures[slots]
    everything = slice(0, slots.stop - slots.start)
    return PutOff(slots, replace(step, t=step.t[slots], refresh=everything, penalty=None, failures=failures), finite)


class Echo:
    """A tensor on its way to the host. Hearing it waits for what its device was told before, not for what came after.

    >>> Echo(torch.tensor([1, 2])).heard()
    tensor([1, 2])
    """

    def __init__(self, x: Tensor) -> None:
        cuda = x.device.type == "cuda"
        self.x = torch.empty(x.shape, dtype=x.dtype, pin_memory=cuda).copy_(x, non_blocking=cuda)
        self.arrived = torch.cuda.current_stream(x.device).record_event() if cuda else None

    def heard(self) -> Tensor:
        """The tensor, on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.x


class Stack:
    """The state of all matrices of shape ``m × n`` in one group, and who sits where."""

    def __init__(self, rule: Rule, group: int, seats: Sequence[Seat], like: Tensor) -> None:
        """Allocate for ``like [B, m, n]``, an empty tensor of the state's dtype on the state's device."""
        self.group = group
        self.seats = list(seats)
        self.size = like.shape[0]
        self.shape = tuple(like.shape[1:])
        self.device = like.device
        self.dtype = like.dtype
        self.storage = Storage.of(rule)
        self.state: State = self.storage.laid_out(rule.init(like))
        self.t = torch.zeros(self.size, 1, 1, dtype=like.dtype, device=like.device)
        self.clock = torch.zeros(self.size, dtype=torch.int64)
        self.skipped = 0
        self.failures = torch.zeros(self.size, dtype=torch.int64, device=like.device)
        self.undone: Echo | None = None
        self.put_off: list[PutOff] = []
        self.recorder = Recorder()
        self._lane: torch.cuda.Stream | None = None
        self._finished: tuple[torch.cuda.Event, list[PutOff]] | None = None

    @classmethod
    def blank(cls, rule: Rule, number: int, seat: Seat, p: Tensor) -> Stack:
        """The stack of one piece of a parameter by itself, without values: on the meta device."""
        b, m, n = seat.view.pieces[seat.piece]
        like = torch.empty(b, m, n, dtype=state_dtype(p), device="meta")
        return cls(rule, number, [replace(seat, start=0, stop=b)], like)

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return sum(x.nbytes for x in (self.t, self.clock, *self.state.values()))

    @phase("gather")
    def fill(self, windows: Windows) -> Tensor:
        """The windows of its pieces as one stack ``[B, m, n]``, in its dtype; slots without one stay unset."""
        out = torch.empty(self.size, *self.shape, dtype=self.dtype, device=self.device)
        there = [(seat, windows[seat.key]) for seat in self.seats if seat.key in windows]
        if there:
            torch._foreach_copy_([out[s.slots] for s, _ in there], [s.view.batch(x, s.piece) for s, x in there])
        return out

    def settle(self) -> None:
        """Have the device wait for what runs `beside`. Count what it left out, and turn back the host's clock for it.

        The host hears of the last step a step late, when the answer has come in and waiting for it holds nothing up.
        """
        if self._finished is not None:
            torch.cuda.current_stream(self.device).wait_event(self._finished[0])
            self._finished = None
        if self.undone is not None:
            undone = self.undone.heard()
            self.skipped += int(undone.sum())
            self.clock -= undone
            self.undone = None

    def has_put_off(self, seat: Seat) -> bool:
        """Whether something of a seat's last step is left for after it."""
        return any(rest.slots.start < seat.stop and seat.start < rest.slots.stop for rest in self.put_off)

    @contextmanager
    def beside(self, held: Sequence[PutOff]) -> Iterator[None]:
        """What a CUDA device is told inside the ``with`` block it does beside what comes after, until `settle`.

        ``held`` is what it reads: memory that would else be given away before it has.
        """
        if self.device.type != "cuda":
            yield
            return
        self._lane = self._lane or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._lane.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._lane):
            yield
        self._finished = self._lane.record_event(), list(held)

    def views(self, seat: Seat) -> dict[str, Tensor]:
        """A seat's state as views into the stack, under the names that `optimizer.state[p]` shows."""
        slots: slice | int = seat.slots if seat.view.batched else seat.start
        named = {"step": self.t.view(-1), "clock": self.clock, **self.state}
        suffix = f".{seat.piece}" if len(seat.view.pieces) > 1 else ""
        return {name + suffix: tensor[slots] for name, tensor in named.items()}

    def runs(self, rule: Rule, live: Sequence[bool], phases: Sequence[int]) -> Iterator[Run]:
        """Cut the live slots into runs. Usually there is one, the whole stack."""
        clocks: list[int] = self.clock.tolist()
        stages = [rule.stage(clock) if alive else None for clock, alive in zip(clocks, live, strict=True)]
        start = 0
        for stop in range(1, self.size + 1):
            stage = stages[start]
            if stop < self.size and stages[stop] == stage:
                continue
            if stage is not None:
                due = [rule.due(clocks[i], phases[i]) for i in range(start, stop)]
                slots = [start + i for i, is_due in enumerate(due) if is_due]
                yield Run(slice(start, stop), stage, _slots(due, self.device), slots)
            start = stop


def loose(index: int, p: Tensor, group: Mapping[str, Any], first: int = 0) -> list[Seat]:
    """Seats for the pieces of ``p``, the parameter at ``index`` of its group, in no stack yet."""
    view = View.of(p, group)
    return [Seat(index, piece, 0, b, view, first) for piece, (b, _, _) in enumerate(view.pieces)]


def lay_out(rule: Rule, number: int, pieces: Iterable[tuple[Seat, Tensor]]) -> list[Stack]:
    """Stacks for pieces of parameters of group ``number``, each with its parameter, in order of first appearance."""
    rows: dict[tuple[Any, ...], list[Seat]] = {}
    for seat, p in pieces:
        b, m, n = seat.view.pieces[seat.piece]
        row = rows.setdefault((m, n, p.device, p.dtype, state_dtype(p)), [])
        start = row[-1].stop if row else 0
        row.append(replace(seat, start=start, stop=start + b))
    return [
        Stack(rule, number, row, torch.empty(row[-1].stop, m, n, dtype=dtype, device=device))
        for (m, n, device, _, dtype), row in rows.items()
    ]


def state_dtype(p: Tensor) -> torch.dtype:
    """float32, or float64 for float64 parameters: sums of outer products are not safe in less."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def beside(state: State, p: Tensor, x: Tensor) -> Tensor:
    """``x`` in the dtype and memory layout of p's state, since fused kernels pair by address; itself if it is."""
    for moment in state.values():
        if moment.shape == p.shape:
            p = moment
            break
    return x if x.dtype == p.dtype and x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host's as a tensor on a device, by way of pinned memory: an ordinary copy would wait for it."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def spread(costs: Sequence[float], period: int) -> list[int]:
    """A phase in ``[0, period)`` for each job, so that the phases' costs are as even as they easily get.

    Dearest first, each to the phase that has least so far; a lone job gets phase 0 and behaves as if unstaggered.

    >>> spread([8.0, 1.0, 8.0, 1.0], period=2), spread([5.0], period=10)
    ([0, 0, 1, 1], [0])
    """
    load = [0.0] * period
    phases = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        phases[job] = load.index(min(load))
        load[phases[job]] += costs[job]
    return phases


def ranges(slots: Sequence[int]) -> list[slice]:
    """Ascending numbers as slices of neighbours.

    >>> ranges([0, 1, 2, 5])
    [slice(0, 3, None), slice(5, 6, None)]
    """
    starts = [k for k, slot in enumerate(slots) if k == 0 or slots[k - 1] != slot - 1]
    return [slice(slots[a], slots[b - 1] + 1) for a, b in pairwise([*starts, len(slots)])]


def _slots(due: Sequence[bool], device: torch.device) -> Slots | None:
    """The positions that are due: a slice where one will do, since indexing by a slice copies nothing."""
    which = [i for i, is_due in enumerate(due) if is_due]
    if not which:
        return None
    if which[-1] - which[0] + 1 == len(which):
        return slice(which[0], which[-1] + 1)
    return to_device(which, device)
