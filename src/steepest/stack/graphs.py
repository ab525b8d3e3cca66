"""Fewer launches: a stack's update as a graph that torch.compile makes, or as a CUDA graph, recorded and replayed.

Stacks of small matrices are bound by launches: some dozens of operations a step, of microseconds each. Both ways are
options of a parameter group, ``compile`` and ``cuda_graph``, and go together. Both are for updates in the stage
"steady" without a refresh; all others run operation by operation. See docs/kernels.md.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.linalg import attempts
from steepest.linalg.precision import fp32_matmul_precision
from steepest.rule import LowRank, Rule, State, Step

Made = Tensor | LowRank | None
"""What a rule's update returns."""

Update = Callable[[Tensor, State, Step], Made]

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Records what a function tells a device, without the device doing it; returns what has it done, once a call."""


# torch.compile.

BACKEND: Any = "inductor"
"""What torch.compile makes graphs with."""


_made: deque[tuple[Rule, torch.Size, Any, Update]] = deque(maxlen=128)


def compiled(rule: Rule, G: Tensor) -> Update:
    """``rule.update`` for stacks of G's shape, compiled at its first call; an equal rule gets the same graph."""
    for other, shape, backend, update in _made:
        if other == rule and shape == G.shape and backend is BACKEND:
            return update
    update = _compiled(rule)
    _made.append((rule, G.shape, BACKEND, update))
    return update


def _compiled(rule: Rule) -> Update:
    def update(G: Tensor, state: State, step: Step) -> Made:
        return rule.update(G, state, step)

    update.__code__ = update.__code__.replace()  # torch counts recompilations by code, and gives up after eight
    graph = torch.compile(update, backend=BACKEND, dynamic=False)

    def run(G: Tensor, state: State, step: Step) -> Made:
        with _precision_of(rule):
            return graph(G, state, step)

    return run


def _precision_of(rule: Rule) -> AbstractContextManager[None]:
    """The precision that a rule's update sets, set around it: in a graph it can't be."""
    word: str | None = getattr(rule, "fp32_matmul_prec", None)
    try:
        return fp32_matmul_precision(word or torch.get_float32_matmul_precision())
    except RuntimeError:  # somebody set the backends one by one
        return nullcontext()


# CUDA graphs.

WARMUP = 2
"""Alike updates in a row before one is recorded: what compiles or allocates at its first call has done so."""


@dataclass(frozen=True)
class Inputs:
    """What one update of a run of b matrices gets that the next one gets anew."""

    G: Tensor
    """``[b, m, n]``."""
    penalty: Tensor | None
    finite: Tensor | None
    """``[b, 1, 1]``."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in (self.G, self.penalty, self.finite) if x is not None]

    def place(self) -> Inputs:
        """Memory for others like these."""
        penalty, finite = (None if x is None else torch.empty_like(x) for x in (self.penalty, self.finite))
        return Inputs(torch.empty_like(self.G), penalty, finite)


Work = Callable[[Inputs], Made]
"""An update with all that it changes."""


class Recorder:
    """A stack's update, recorded once it has come a few times in a row, and replayed from then on.

    A recording works on memory of its own: inputs are copied there, and directions are found there, until the next
    replay. State it changes where it is. It holds for one key, which is everything else that the update depends on;
    under any other the update runs operation by operation, and if it comes in a row, takes the recording's place.
    """

    def __init__(self) -> None:
        self.recording: Recording | None = None
        """What is replayed, if anything is."""
        self._key: Sequence[Any] = ()  # of what may be recorded next
        self._seen = 0
        self._fit = True
        self._made: Made = None

    def __call__(self, work: Work, inputs: Inputs, key: Sequence[Any]) -> Made:
        """``work(inputs)``, or a replay of it.

        Args:
            work: the update; under one key it does the same to whatever inputs.
            inputs: what it gets.
            key: what it depends on beside inputs and state; compared, not hashed.
        """
        device = inputs.G.device
        if device.type not in CAPTURES:
            return work(inputs)
        key = [*key, inputs.penalty is None, inputs.finite is None, *_surroundings(device)]
        if self.recording is not None and self.recording.key == key:
            self._seen = 0
            return self.recording.replayed(inputs)
        if self._key != key:
            self._key, self._seen, self._fit = key, 0, True
        self._seen += 1
        if self._seen < WARMUP or not self._fit:
            return work(inputs)
        if self._seen == WARMUP:
            calls = attempts.calls
            made = work(inputs)
            self._fit, self._made = attempts.calls == calls, _place(made)  # solvers ask the device how it went
            return made
        try:
            self.recording = Recording(key, work, inputs.place(), self._made)
        except RuntimeError as error:
            warnings.warn(f"cuda_graph=True: an update can't be recorded, and runs without: {error}", stacklevel=2)
            self._fit = False
            return work(inputs)
        return self.recording.replayed(inputs)


class Recording:
    """One update on memory of its own."""

    def __init__(self, key: Sequence[Any], work: Work, inputs: Inputs, made: Made) -> None:
        def fill() -> None:
            for x, y in zip(_tensors(made), _tensors(work(inputs)), strict=True):
                x.copy_(y)

        self.key = key
        self.inputs = inputs
        self.made = made
        self.replay = CAPTURES[inputs.G.device.type](fill, inputs.G.device)

    def replayed(self, inputs: Inputs) -> Made:
        """What the update makes of other inputs."""
        for x, y in zip(self.inputs.tensors, inputs.tensors, strict=True):
            x.copy_(y)
        self.replay()
        return self.made


def _tensors(made: Made) -> list[Tensor]:
    if isinstance(made, LowRank):
        return [made.left, made.right]
    return [] if made is None else [made]


def _place(made: Made) -> Made:
    """Memory for others like these."""
    if isinstance(made, LowRank):
        return LowRank(torch.empty_like(made.left), torch.empty_like(made.right))
    return None if made is None else torch.empty_like(made)


def _surroundings(device: torch.device) -> list[Any]:
    """What of the process a recording depends on."""
    if device.type != "cuda":
        return []
    return [torch.backends.cuda.matmul.fp32_precision, torch.cuda.current_stream(device)]


_pools: dict[tuple[torch.device, torch.cuda.Stream], Any] = {}


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """As a `torch.cuda.CUDAGraph`, which costs a synchronization.

    Recordings of one stream share memory for what lives within a replay; nothing that outlives it is in there.
    """
    stream = torch.cuda.current_stream(device)
    if (device, stream) not in _pools:
        _pools[device, stream] = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # Errors count in this thread only: others may pin memory meanwhile.
    recording = torch.cuda.graph(graph, _pools[device, stream], _stream(device), capture_error_mode="thread_local")
    with torch.cuda.device(device):
        try:
            with recording:
                work()
        finally:
            torch.cuda.set_stream(stream)  # where a capture fails, torch leaves its own in place
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


CAPTURES: dict[str, Capture] = {"cuda": _capture}
"""By the type of a device. On others nothing is recorded."""
