"""Fewer launches: an update as a graph of torch.compile, or as a CUDA graph that is recorded once and then replayed.

Stacks of small matrices are bound by launches: some dozens of operations a step, of microseconds each. Both ways are
options of a parameter group, ``compile`` and ``cuda_graph``, and can be combined. Both apply to updates in the stage
"steady" without a refresh; all other updates run operation by operation. See docs/kernels.md.
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
from steepest.stack.compiling import inductor

Output = Tensor | LowRank | None
"""What a rule's update returns."""

Update = Callable[[Tensor, State, Step], Output]

Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]
"""Records the operations that a function launches, without running them, and returns the function that runs them."""


# torch.compile.

BACKEND: Any = inductor
"""The backend of torch.compile."""


MOST = 8
"""Changes of options in a row, each of which compiles anew, after which updates run without until options stay."""

_compiled: deque[tuple[Rule, torch.Size, Any, Update]] = deque(maxlen=128)
_changes: dict[tuple[type[Rule], torch.Size], tuple[int, Rule]] = {}  # in a row, and the last rule


def compiled(rule: Rule, G: Tensor) -> Update:
    """Return ``rule.update`` compiled for stacks of G's shape; equal rules share one graph.

    Options that a scheduler moves in every step would make every step compile. Those run as they are.
    """
    key = type(rule), G.shape
    for other, shape, backend, update in _compiled:
        if other == rule and shape == G.shape and backend is BACKEND:
            _changes.pop(key, None)
            return update
    changes, last = _changes.get(key, (0, None))
    _changes[key] = changes + 1, rule
    if changes >= MOST and rule != last:
        if changes == MOST:
            warnings.warn(
                f"compile=True: options of {rule.name} have changed {MOST} times in a row, and each change compiles "
                "anew; updates run without torch.compile until the options stay",
                stacklevel=2,
            )
        return rule.update
    update = _compile(rule)
    _compiled.append((rule, G.shape, BACKEND, update))
    return update


def _compile(rule: Rule) -> Update:
    def update(G: Tensor, state: State, step: Step) -> Output:
        return rule.update(G, state, step)

    update.__code__ = update.__code__.replace()  # torch counts recompilations by code, and gives up after eight
    graph = torch.compile(update, backend=BACKEND, dynamic=False)

    def run(G: Tensor, state: State, step: Step) -> Output:
        with _precision_of(rule):
            return graph(G, state, step)

    return run


def _precision_of(rule: Rule) -> AbstractContextManager[None]:
    """Return a context that sets the precision of a rule's update around the graph, where it can't be set inside."""
    word: str | None = getattr(rule, "fp32_matmul_prec", None)
    try:
        return fp32_matmul_precision(word or torch.get_float32_matmul_precision())
    except RuntimeError:  # the backends' precisions were set one by one
        return nullcontext()


# CUDA graphs.

WARMUP = 2
"""Equal updates in a row before one is recorded, so that everything that compiles or allocates once has done so."""


@dataclass(frozen=True)
class Inputs:
    """The tensors that differ from one update of b matrices to the next."""

    G: Tensor
    """``[b, m, n]``."""
    penalty: Tensor | None
    lost: Tensor | None
    """``[b, 1, 1]``; see `steepest.rule.Step`."""

    @property
    def tensors(self) -> list[Tensor]:
        """Return the inputs that are not None."""
        return [x for x in (self.G, self.penalty, self.lost) if x is not None]

    def empty_like(self) -> Inputs:
        """Allocate memory for inputs of the same shapes."""
        penalty, lost = (None if x is None else torch.empty_like(x) for x in (self.penalty, self.lost))
        return Inputs(torch.empty_like(self.G), penalty, lost)


Work = Callable[[Inputs], Output]
"""An update with everything that it changes."""


class Recorder:
    """A recorder records a stack's update once it has come a few times in a row, and replays it from then on.

    A recording works on memory of its own: inputs are copied there, and directions stay there until the next replay.
    State is changed where it is. A recording holds for one key, which is everything else that the update depends on.
    Under any other key the update runs operation by operation; if that key comes in a row, its recording replaces the
    old one.
    """

    def __init__(self) -> None:
        self.recording: Recording | None = None
        """The recording that is replayed, if there is one."""
        self._key: Sequence[Any] = ()  # the key that may be recorded next
        self._seen = 0
        self._recordable = True
        self._output: Output = None

    def __call__(self, work: Work, inputs: Inputs, key: Sequence[Any]) -> Output:
        """Return ``work(inputs)``, or the result of replaying it.

        Args:
            work: the update, which does the same to any inputs as long as the key is the same.
            inputs: the inputs of the update.
            key: everything that the update depends on besides inputs and state; keys are compared, not hashed.
        """
        device = inputs.G.device
        if device.type not in CAPTURES:
            return work(inputs)
        key = [*key, inputs.penalty is None, inputs.lost is None, *_settings(device)]
        if self.recording is not None and self.recording.key == key:
            self._seen = 0
            return self.recording.replayed(inputs)
        if self._key != key:
            self._key, self._seen, self._recordable = key, 0, True
        self._seen += 1
        if self._seen < WARMUP or not self._recordable:
            return work(inputs)
        if self._seen == WARMUP:
            calls = attempts.calls
            output = work(inputs)
            self._recordable = attempts.calls == calls  # solvers ask the device whether they succeeded
            self._output = _empty_like(output)
            return output
        try:
            self.recording = Recording(key, work, inputs.empty_like(), self._output)
        except RuntimeError as error:
            warnings.warn(f"cuda_graph=True: an update can't be recorded, and runs without: {error}", stacklevel=2)
            self._recordable = False
            return work(inputs)
        return self.recording.replayed(inputs)


class Recording:
    """A recording is one update on memory of its own."""

    def __init__(self, key: Sequence[Any], work: Work, inputs: Inputs, output: Output) -> None:
        def fill() -> None:
            for x, y in zip(_tensors(output), _tensors(work(inputs)), strict=True):
                x.copy_(y)

        self.key = key
        self.inputs = inputs
        self.output = output
        self.replay = CAPTURES[inputs.G.device.type](fill, inputs.G.device)

    def replayed(self, inputs: Inputs) -> Output:
        """Replay the update on other inputs, and return its output."""
        for x, y in zip(self.inputs.tensors, inputs.tensors, strict=True):
            x.copy_(y)
        self.replay()
        return self.output


def _tensors(output: Output) -> list[Tensor]:
    if isinstance(output, LowRank):
        return [output.left, output.right]
    return [] if output is None else [output]


def _empty_like(output: Output) -> Output:
    """Allocate memory for an output of the same shape."""
    if isinstance(output, LowRank):
        return LowRank(torch.empty_like(output.left), torch.empty_like(output.right))
    return None if output is None else torch.empty_like(output)


def _settings(device: torch.device) -> list[Any]:
    """Return the settings of the process that a recording depends on."""
    if device.type != "cuda":
        return []
    return [torch.backends.cuda.matmul.fp32_precision, torch.cuda.current_stream(device)]


_pools: dict[tuple[torch.device, torch.cuda.Stream], Any] = {}


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``work`` as a `torch.cuda.CUDAGraph`, which costs one synchronization.

    Recordings of one stream share memory for what lives within a replay; nothing that outlives a replay is in there.
    """
    stream = torch.cuda.current_stream(device)
    if (device, stream) not in _pools:
        _pools[device, stream] = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # Errors count in this thread only, because other threads may pin memory meanwhile.
    recording = torch.cuda.graph(graph, _pools[device, stream], _stream(device), capture_error_mode="thread_local")
    with torch.cuda.device(device):
        try:
            with recording:
                work()
        finally:
            torch.cuda.set_stream(stream)  # torch leaves its own stream in place if a capture fails
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


CAPTURES: dict[str, Capture] = {"cuda": _capture}
"""How updates are recorded, by the type of a device. On other devices nothing is recorded."""
