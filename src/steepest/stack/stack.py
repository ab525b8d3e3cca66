"""Stacks: all matrices of one shape, held as one tensor ``[B, m, n]``, whichever parameter groups they are in.

Each matrix has a slot of its stack, and the matrices of one piece of one parameter have a segment of consecutive slots.
Groups share a stack if their rules lay state out alike; matrices that are stepped in different ways are in different
runs.
A stack is allocated once and persists; `torch.optim.Optimizer.state` holds views into it. Each slot has two clocks.
``t`` is on the device and counts the updates that a matrix has had, for bias corrections. ``clock`` is on the host and
counts the same updates, so that refreshes can be scheduled without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steepest.rule import Rule, Slots, State, Statistics, Step
from steepest.stack.graphs import Recorder
from steepest.stack.storage import Storage, laid_out
from steepest.view import View

Pieces = Mapping[tuple[int, int], Tensor]
"""The matrices ``[b, m, n]`` of each piece that takes part in a step, by the `Segment.key` of its segment."""


@dataclass(frozen=True)
class Way:
    """The way in which the matrices of a parameter group are stepped."""

    rule: Rule
    penalty: float
    """The weight decay that is part of the gradient; 0 if none is."""
    compile: bool
    cuda_graph: bool
    stagger: bool


@lru_cache(maxsize=1024)
def shared(way: Way) -> Way:
    """Return the object that stands for all ways equal to this one, which are then told apart by identity."""
    return way


@dataclass(frozen=True)
class Segment:
    """A segment is the slots ``start:stop`` of a stack, which hold one piece of one parameter."""

    index: int
    """The number of the parameter, counted over all groups."""
    group: int
    """The number of its group."""
    piece: int
    """The number of the piece in the parameter's view."""
    start: int
    stop: int
    view: View
    first: int = 0
    """The number of the segment's first matrix in the whole parameter, if this rank holds only some of its matrices."""
    bias: int | None = None
    """The number of the parameter that is the last column of the segment's matrices; None if there is none."""

    @cached_property
    def key(self) -> tuple[int, int]:
        """Return the numbers of the parameter and of the piece, which tell segments apart."""
        return self.index, self.piece

    @cached_property
    def slots(self) -> slice:
        """Return ``start:stop`` as a slice."""
        return slice(self.start, self.stop)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape ``(b, m, n)`` of the segment's matrices."""
        return self.view.pieces[self.piece]

    def part(self, whole: Statistics) -> Statistics:
        """Return the segment's part of a layer's statistics ``A [g, n, n]``, ``B [g, m, m]``: diagonal blocks.

        The layer's outputs are in g groups, each with inputs of its own. A layer without groups may have heads, each of
        which sees all inputs.
        """
        rows, columns = self.view.blocks[self.piece]
        columns = slice(columns.start, columns.stop + self.view.joins(self.piece))
        A, B, S = whole.A[..., columns, columns], whole.B, whole.S
        if len(A) == 1:
            b, m, _ = self.shape
            B = B[..., rows, rows].reshape(b, m, b, m).diagonal(dim1=0, dim2=2).movedim(-1, 0)
            A = A.expand(b, -1, -1)
            S = S if S is None else S[..., rows, columns].reshape(self.shape)
        return Statistics(A, B, S)


@dataclass(frozen=True)
class Run:
    """A run is a range of slots that are updated together: all take part, in the same way and in the same stage."""

    slots: slice
    way: Way
    stage: str
    refresh: Slots | None
    """The slots that refresh, counted from the first slot of the run; None if no slot refreshes."""
    due: Sequence[int]
    """The same slots, counted from the first slot of the stack, on the host."""


@dataclass(frozen=True)
class Deferred:
    """A refresh that a rule has deferred until after the step, for a range of slots that are all due."""

    slots: slice
    rule: Rule
    step: Step
    """The step, reduced to these slots."""
    finite: Tensor | None
    """``[b, 1, 1]``, False for the matrices in which the step must leave no trace; None if there are none."""


class AsyncCopy:
    """A copy of a tensor to the host that is made asynchronously.

    >>> AsyncCopy(torch.tensor([1, 2])).wait()
    tensor([1, 2])
    """

    def __init__(self, x: Tensor) -> None:
        cuda = x.device.type == "cuda"
        self.x = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=cuda).copy_(x, non_blocking=cuda)
        self.copied = torch.cuda.current_stream(x.device).record_event() if cuda else None

    def __getitem__(self, slots: slice) -> AsyncCopy:
        """Return a part of the copy, for which one waits likewise."""
        part = copy(self)
        part.x = self.x[slots]
        return part

    def wait(self) -> Tensor:
        """Wait for the copy, but not for anything that the device was told to do after it, and return it."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.x


class Stack:
    """A stack holds the state of matrices of one shape ``m × n``, and the segments that they belong to."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], like: Tensor) -> None:
        """Allocate state for ``like [B, m, n]``, an empty tensor that has the state's dtype and device."""
        self.segments = list(segments)
        self.groups = _groups(segments)
        self.size = like.shape[0]
        self.shape = tuple(like.shape[1:])
        self.device = like.device
        self.dtype = like.dtype
        self.storage = Storage.of(rule)
        self.state: State = laid_out(rule, like)
        self.t = torch.zeros(self.size, 1, 1, dtype=like.dtype, device=like.device)
        self.clock = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        self.skipped = 0
        self.failures = torch.zeros(self.size, dtype=torch.int64, device=like.device)
        self.undone: AsyncCopy | None = None
        self.deferred: list[Deferred] = []
        self.recorder = Recorder()
        self._stream: torch.cuda.Stream | None = None
        self._finished: tuple[torch.cuda.Event, list[Deferred]] | None = None

    def views(self, segment: Segment) -> dict[str, Tensor]:
        """Return a segment's state as views into the stack, under the names that ``optimizer.state[p]`` shows."""
        slots: slice | int = segment.slots if segment.view.batched else segment.start
        named = {"step": self.t.view(-1), "clock": self.clock, **self.state}
        suffix = f".{segment.piece}" if len(segment.view.pieces) > 1 else ""
        return {name + suffix: tensor[slots] for name, tensor in named.items()}

    def clocks(self, segment: Segment) -> dict[str, Tensor]:
        """Return the two clocks of a segment's first matrix, as the state of its bias shows them."""
        return {"step": self.t.view(-1)[segment.start], "clock": self.clock[segment.start]}

    def renew(self) -> None:
        """Move the state to other memory; views of it that others hold keep what they show."""
        self.state = {name: x.clone() for name, x in self.state.items()}
        self.t, self.clock = self.t.clone(), self.clock.clone()
        self.recorder = Recorder()

    def fill(self, pieces: Pieces) -> Tensor:
        """Return the pieces as one tensor ``[B, m, n]`` in the state's dtype; slots without a piece stay unset."""
        present, sources, alike = [], [], True
        for segment in self.segments:
            if (x := pieces.get(segment.key)) is not None:
                present.append(segment)
                sources.append(x)
                alike = alike and x.dtype == self.dtype
        if alike and len(sources) == len(self.segments):
            return torch.cat(sources)  # takes half the host's time of what follows
        out = torch.empty(self.size, *self.shape, dtype=self.dtype, device=self.device)
        if sources:
            torch._foreach_copy_([out[segment.slots] for segment in present], sources)
        return out

    def fed(self, run: Run, statistics: Mapping[tuple[int, int], Statistics]) -> Statistics | None:
        """Return the statistics of a run's matrices, by slots of the run; None if none of them has any."""
        slots: list[int] = []
        parts: list[Statistics] = []
        for segment in self.segments:
            start, stop = max(segment.start, run.slots.start), min(segment.stop, run.slots.stop)
            if start < stop and segment.key in statistics:
                x, here = statistics[segment.key], slice(start - segment.start, stop - segment.start)
                parts.append(Statistics(x.A[here], x.B[here], None if x.S is None else x.S[here]))
                slots += range(start, stop)
        where = _relative(slots, run.slots.start, self.device)
        if where is None:
            return None
        S = [x.S for x in parts if x.S is not None]
        return Statistics(
            _joined([x.A for x in parts]),
            _joined([x.B for x in parts]),
            _joined(S) if len(S) == len(parts) else None,
            where,
        )

    def runs(self, ways: Sequence[Way | None], live: Sequence[bool], offsets: Sequence[float]) -> list[Run]:
        """Cut the slots that are ``live`` into runs; usually there is one run, which is the whole stack.

        Args:
            ways: the way in which each group is stepped.
            live: for each slot, whether it takes part in the step.
            offsets: for each slot, after which fraction of its period it refreshes.
        """
        clocks: list[int] = self.clock.tolist()
        runs = []
        for way, start, end in self._stretches(ways):
            stages = {clock: way.rule.stage(clock) for clock in set(clocks[start:end])}
            is_due = {
                pair: way.rule.due(*pair) for pair in set(zip(clocks[start:end], offsets[start:end], strict=True))
            }
            while start < end:
                stage, stop = stages[clocks[start]], start + 1
                while stop < end and live[stop] == live[start] and stages[clocks[stop]] == stage:
                    stop += 1
                if live[start]:
                    due = [i for i in range(start, stop) if is_due[clocks[i], offsets[i]]]
                    runs.append(Run(slice(start, stop), way, stage, _relative(due, start, self.device), due))
                start = stop
        return runs

    def _stretches(self, ways: Sequence[Way | None]) -> list[tuple[Way, int, int]]:
        """Return the ways in which the slots are stepped, each with the range ``start, stop`` of its slots."""
        found: list[tuple[Way, int, int]] = []
        for number, start, stop in self.groups:
            way = ways[number]
            assert way is not None
            if found and found[-1][0] is way:
                start = found.pop()[1]
            found.append((way, start, stop))
        return found

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Run what a CUDA device is told in the ``with`` block on a side stream, beside whatever follows.

        `settle` waits for the side stream. Until then the stack keeps what it has deferred, because the side stream
        reads that memory.
        """
        if self.device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
        self._finished = self._stream.record_event(), list(self.deferred)

    def settle(self) -> None:
        """Make the device wait for the side stream, and account for the updates that the device has undone.

        The host learns one step later which updates of the last step were undone, when waiting for that answer holds
        nothing up. It counts them as skipped, and turns its clock back for them.
        """
        if self._finished is not None:
            torch.cuda.current_stream(self.device).wait_event(self._finished[0])
            self._finished = None
        if self.undone is not None:
            undone = self.undone.wait().view(-1).long()
            self.skipped += int(undone.sum())
            self.clock -= undone
            self.undone = None


def segments_of(
    index: int, number: int, p: Tensor, group: Mapping[str, Any], first: int = 0, bias: int | None = None
) -> list[Segment]:
    """Return a segment for each piece of a parameter, which is in no stack yet.

    Args:
        index: the number of the parameter, counted over all groups.
        number: the number of its group.
        p: the parameter.
        group: the options of its group.
        first: the number of its first matrix in the whole parameter, if this rank holds only some of its matrices.
        bias: the number of the layer's bias, where the view joins it.
    """
    view = View.of(p, group)
    return [
        Segment(index, number, piece, 0, b, view, first, bias if view.joins(piece) else None)
        for piece, (b, _, _) in enumerate(view.pieces)
    ]


def lay_out(ways: Sequence[Way | None], segments: Iterable[tuple[Segment, Tensor]]) -> list[Stack]:
    """Allocate stacks for segments, each given with its parameter; stacks come in the order of their first segments."""
    stacked: dict[tuple[Any, ...], list[Segment]] = {}
    for segment, p in segments:
        b, m, n = segment.shape
        key = rule_of(ways, segment).layout, m, n, p.device, p.dtype, state_dtype(p)
        members = stacked.setdefault(key, [])
        start = members[-1].stop if members else 0
        members.append(replace(segment, start=start, stop=start + b))
    return [
        Stack(rule_of(ways, members[0]), members, torch.empty(members[-1].stop, m, n, dtype=dtype, device=device))
        for (_, m, n, device, _, dtype), members in stacked.items()
    ]


def _groups(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Return the numbers of the groups that neighbouring segments belong to, and the slots of these segments."""
    found: list[tuple[int, int, int]] = []
    for segment in segments:
        start = found.pop()[1] if found and found[-1][0] == segment.group else segment.start
        found.append((segment.group, start, segment.stop))
    return found


def rule_of(ways: Sequence[Way | None], segment: Segment) -> Rule:
    """Return the rule by which a segment is stepped."""
    way = ways[segment.group]
    assert way is not None
    return way.rule


def state_alone(rule: Rule, segment: Segment, p: Tensor, device: str | torch.device) -> dict[str, Tensor]:
    """Return the fresh state of a segment of ``p`` as `Stack.views` shows it, in no stack; on "meta" without values."""
    b, m, n = segment.shape
    alone = replace(segment, start=0, stop=b)
    return Stack(rule, [alone], torch.empty(b, m, n, dtype=state_dtype(p), device=device)).views(alone)


def state_dtype(p: Tensor) -> torch.dtype:
    """Return float32, or float64 for float64 parameters, because sums of outer products are not safe in less."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Return a list of numbers as a tensor on a device, through pinned memory: a plain copy would wait for the GPU."""
    return torch.tensor(values, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)


def ranges(slots: Sequence[int]) -> list[slice]:
    """Return ascending numbers as slices of consecutive numbers.

    >>> ranges([0, 1, 2, 5])
    [slice(0, 3, None), slice(5, 6, None)]
    """
    starts = [k for k, slot in enumerate(slots) if k == 0 or slots[k - 1] != slot - 1]
    return [slice(slots[a], slots[b - 1] + 1) for a, b in pairwise([*starts, len(slots)])]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _relative(due: Sequence[int], start: int, device: torch.device) -> Slots | None:
    """Count slots from ``start``; as a slice where one will do, since indexing by a slice copies nothing."""
    if not due:
        return None
    if due[-1] - due[0] + 1 == len(due):
        return slice(due[0] - start, due[-1] + 1 - start)
    return to_device([i - start for i in due], device)
