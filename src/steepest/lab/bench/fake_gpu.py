"""A GPU that isn't there: steps on tensors that have a shape and a device and no values, with every operation counted.

Tensors on "cuda" are torch's fake tensors; those on the host are real, so that clocks tick and refreshes fall due. A
dispatch mode sees each operation: what it launches, the bytes of its tensors, its FLOPs, whether the host would wait
for its result, and whether its tensors are on different devices. The kernels of `steepest.kernels` are off: their twins
run. Nothing is timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steepest import kernels
from steepest.engine.phases import Timeline, listening
from steepest.rule.work import ATEN, flops_of, without_values

GPU = torch.device("cuda", 0)
CAPABILITY = (9, 0)
"""The compute capability of the GPU, an H100's or H200's: it multiplies in bfloat16."""

GENERATOR = torch.Generator
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_LAUNCH = ALLOCATIONS | {"_unsafe_view", "_reshape_alias", "lift_fresh", "device"}
"""Operations that launch nothing, beside those that torch knows to be views."""
REPORT_ERRORS = {"_linalg_eigh", "_linalg_svd", "_linalg_check_errors"}
"""Decompositions that report to the host whether they have converged."""
UNSEEN = ("bench/fake_gpu.py", "engine/phases.py", "linalg/surroundings.py", "rule/work.py")
"""The modules that stand around calls, whose lines tell nothing."""
TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Operation:
    """An operation on the GPU."""

    name: str
    line: str
    """The line of this library that calls it."""
    phase: str
    """The phase of a step that it belongs to; see `steepest.engine.phases`."""
    launches: int
    """1, also where torch splits a list of tensors among several kernels; but where it goes through the list tensor by
    tensor, because their layouts differ, the number of tensors."""
    bytes: int
    """Of the tensors that it takes and gives, each once: also one that is given twice, or that is changed in place."""
    flops: float
    """Of products and decompositions; see `steepest.rule.work`."""


@dataclass
class Counted:
    """What one step does to a GPU."""

    operations: list[Operation] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    """The operations whose result the host waits for, with the lines that call them."""
    strays: list[str] = field(default_factory=list)
    """The operations whose tensors are on different devices."""

    @property
    def launches(self) -> int:
        """The number of launches."""
        return sum(one.launches for one in self.operations)

    @property
    def bytes(self) -> int:
        """The bytes of all operations' tensors."""
        return sum(one.bytes for one in self.operations)

    @property
    def flops(self) -> float:
        """The FLOPs of all products and decompositions."""
        return sum(one.flops for one in self.operations)

    def by(self, key: Callable[[Operation], str]) -> dict[str, Counted]:
        """Return the operations in parts, the most bytes first."""
        parts: dict[str, Counted] = {}
        for one in self.operations:
            parts.setdefault(key(one), Counted()).operations.append(one)
        return dict(sorted(parts.items(), key=lambda part: -part[1].bytes))


class FakeGPU:
    """A GPU on which nothing is computed, and everything is counted; `fake_gpu` makes one."""

    def __init__(self) -> None:
        self.answer = 0
        """The number that everything holds that is copied from the GPU to the host."""
        self.host = _Host()
        self.timeline: Timeline[None] | None = None
        self.counted = Counted()

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Count what a ``with`` block does to the GPU."""
        self.counted, self.timeline = Counted(), Timeline(lambda: None)
        self.host.pinned.clear()
        with listening(self.timeline):
            yield self.counted
        self.timeline = None


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Have a fake GPU inside a ``with`` block: tensors on `GPU` have no values there, and those on the CPU have some.

    Example:
        >>> with fake_gpu() as gpu:
        ...     x = torch.ones(2, 3, device=GPU)
        ...     with gpu.counting() as counted:
        ...         y = x.add_(1) @ x.mT
        >>> y.shape, counted.launches, counted.bytes, counted.flops
        (torch.Size([2, 2]), 2, 64, 24.0)
    """
    gpu = FakeGPU()
    with ExitStack() as stack:
        for name, stand_in in {
            "get_device_capability": lambda device=None: CAPABILITY,
            "current_stream": _Stream,
            "Stream": _Stream,
            "stream": lambda of: nullcontext(),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(kernels.use("never"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu.host)
        stack.enter_context(_Devices(gpu))
        yield gpu


class _Generator(GENERATOR):
    """A generator on the host, whatever device it is asked for."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Stream:
    """A stream, and an event, with nothing to wait for."""

    def __init__(self, device: Any = None) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def wait_event(self, event: _Stream) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Host(TorchFunctionMode):
    """Does without CUDA what torch's Python side would do with it: it pins nothing, and indexes by operations."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        """What would be pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in GUARDED and isinstance(args[0], FakeTensor):
            return GUARDED[func](*args, **kwargs)
        if isinstance(kwargs.get("generator"), GENERATOR) and torch.device(kwargs.get("device", "cpu")).type == "cuda":
            del kwargs["generator"]  # which is on the host
        pins = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if pins:
            self.pinned.append(out)
        return out


def _basic(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return the view of ``x`` by everything in an index but tensors, and these tensors by the view's dimensions."""
    parts = list(index) if isinstance(index, tuple) else [index]
    given = sum(part is not None and part is not Ellipsis for part in parts)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[at : at + 1] = [slice(None)] * (x.dim() - given)
    tensors: list[Tensor | None] = []
    for part in parts:
        dim = len(tensors)
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice) and part != slice(None):
            x = ATEN.slice(x, dim, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, Tensor) else None)
    return x, tensors


def _indexed(x: Tensor, index: Any) -> Tensor:
    """``x[index]``."""
    view, tensors = _basic(x, index)
    chosen: Tensor = view if all(i is None for i in tensors) else ATEN.index(view, tensors)
    return chosen


def _assign(x: Tensor, index: Any, value: Any) -> None:
    """``x[index] = value``."""
    view, tensors = _basic(x, index)
    if any(i is not None for i in tensors):
        ATEN.index_put_(view, tensors, value)
    elif isinstance(value, Tensor):
        _copy(view, value)
    else:
        view.fill_(value)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``x.copy_(source)``, past what autograd does for it."""
    with torch._C._AutoDispatchBelowAutograd():
        copied: Tensor = ATEN.copy_(x, source, non_blocking)
    return copied


GUARDED: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _assign,
    Tensor.__invert__: torch.bitwise_not,
    Tensor.copy_: _copy,
    Tensor.item: ATEN._local_scalar_dense,
    Tensor.__bool__: lambda x: bool(ATEN._local_scalar_dense(x)),
    Tensor.__int__: lambda x: int(ATEN._local_scalar_dense(x)),
    Tensor.__float__: lambda x: float(ATEN._local_scalar_dense(x)),
    Tensor.contiguous: lambda x: x if x.is_contiguous() else ATEN.clone(x, memory_format=torch.contiguous_format),
}
"""The methods that want a device even for a tensor without values, and what does the same without."""


class _Devices(TorchDispatchMode):
    """Runs operations on the host for real and those on the GPU without values, and counts the latter."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        to = None if device is None else torch.device(device).type
        if not any(isinstance(x, FakeTensor) for x in taken) and to != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
        if func is ATEN.copy_.default and not isinstance(args[0], FakeTensor):
            if not (non_blocking and self._is_pinned(args[0])):
                self._waits(name)
            self._note(func, args, kwargs, taken)
            with unset_fake_temporarily():
                return args[0].fill_(self.gpu.answer)
        if to == "cpu":
            self._waits(name)
            self._note(func, args, kwargs, taken)
            with unset_fake_temporarily():
                return torch.full(args[0].shape, self.gpu.answer, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "_local_scalar_dense":
            self._waits(name)
            return self.gpu.answer or 1
        from_host = [x for x in taken if not isinstance(x, FakeTensor) and x.dim() > 0]
        if from_host and (name == "copy_" or to == "cuda"):
            if not (all(map(self._is_pinned, from_host)) and non_blocking):
                self._waits(name)
        elif from_host:
            self.gpu.counted.strays.append(f"{name} {_line()}")
        chooses = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in REPORT_ERRORS or chooses or TAGS & set(func.tags):
            self._waits(name)
        out = without_values(func, args, kwargs)
        self._note(func, args, kwargs, [*taken, *(x for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out

    def _waits(self, name: str) -> None:
        self.gpu.counted.waits.append(f"{name} {_line()}")

    def _is_pinned(self, x: Tensor) -> bool:
        return any(x is pinned for pinned in self.gpu.host.pinned)

    def _note(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if self.gpu.timeline is None or func.is_view or name in NO_LAUNCH:
            return
        part = flops_of(func, args)
        phase, launches, flops = self.gpu.timeline.phase, _launches(name, args), part[1] if part else 0.0
        self.gpu.counted.operations.append(Operation(name, _line(), phase, launches, _bytes(tensors), flops))


def _bytes(tensors: Sequence[Tensor]) -> int:
    """The bytes of tensors; one that is there twice, perhaps transposed, counts once."""
    places = {(x.untyped_storage()._cdata, x.storage_offset(), _entries(x)): x.itemsize for x in tensors}
    return sum(entries * size for (*_, entries), size in places.items())


def _entries(x: Tensor) -> int:
    """The number of entries that a tensor has in memory: one that is expanded has fewer than its shape says."""
    n = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n


def _launches(name: str, args: Any) -> int:
    """1; for a list of tensors that torch takes one by one, their number."""
    lists = [xs for xs in args if isinstance(xs, (list, tuple)) and xs and isinstance(xs[0], Tensor)]
    if not name.startswith(("_foreach", "_fused")) or not lists:
        return 1
    layouts = [[(x.shape, x.stride(), x.is_cuda) for x in xs] for xs in lists if len(xs) == len(lists[0])]
    alike = name.startswith("_fused") or all(layout == layouts[0] for layout in layouts)
    return 1 if alike and all(map(_is_dense, lists[0])) else len(lists[0])


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _line() -> str:
    """The innermost line of this library that runs, without this module and the marks of phases."""
    frame = inspect.currentframe()
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if "/steepest/" in file and not file.endswith(UNSEEN):
            return f"{file.rpartition('/steepest/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


# Optimizers on it.


@dataclass(frozen=True)
class Steps:
    """The first step of an optimizer, and of one period after it the steps with the most and the least bytes."""

    first: Counted
    most: Counted
    least: Counted


def count_steps(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], shapes: Sequence[Sequence[int]], period: int
) -> Steps:
    """Let an optimizer of parameters of these shapes, in float32, take a step and then ``period`` more."""
    with fake_gpu() as gpu:
        params = [torch.nn.Parameter(torch.empty(*shape, device=GPU)) for shape in shapes]
        optimizer = make(params)
        counted = []
        for _ in range(1 + period):
            for p in params:
                p.grad = torch.empty_like(p)
            with gpu.counting() as step:
                optimizer.step()
            counted.append(step)
    first, *others = counted
    return Steps(first, max(others, key=lambda step: step.bytes), min(others, key=lambda step: step.bytes))
