"""Chapters 14 and 16: training under somebody else's compiler, autocast, default device and other settings of torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from steepest.testing.evidence import NotApplicable, Snapshot, expect, expect_close, expect_same
from steepest.testing.run import Run
from steepest.testing.saving import carry
from steepest.testing.subject import Subject, clause

Surroundings = Callable[[], AbstractContextManager[Any]]


@clause(14, "torch.compile(optimizer.step) makes no new graph when lr changes", needs=("lr",), slow=True)
def compiled_step(subject: Subject) -> None:
    """The step can be compiled, trains as without, and does not recompile when a tensor learning rate changes."""
    graphs = 0  # how often tracing has begun

    def backend(module: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    counts = _train_compiled(subject, backend, lambda: graphs)
    expect(counts[-1] == counts[5], "no new graph when lr changes", f"graphs so far, step by step: {counts}")


@clause(14, "torch.compile(optimizer.step) with Inductor trains as without", needs=("lr",), slow=True)
def inductor_step(subject: Subject) -> None:
    """What torch.compile generates by default computes the same: hosts compile their training step as a whole."""
    compilers = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        raise NotApplicable("Inductor needs a C++ compiler")
    _train_compiled(subject, "inductor")


@clause(16, "a step under autocast is the same")
def autocast(subject: Subject) -> None:
    """Products of a step must not be rounded to bfloat16 where the ``with`` block of the forward pass includes it."""
    _expect_indifference(subject, lambda: torch.autocast(subject.device.type, torch.bfloat16), "under autocast")


@clause(16, "another default device changes nothing")
def default_device(subject: Subject) -> None:
    """State and constants are where the parameters are, whatever `torch.set_default_device` says."""
    _expect_indifference(subject, lambda: torch.device("meta"), "under another default device")


@clause(16, "another default dtype changes nothing")
def default_dtype(subject: Subject) -> None:
    """State and constants have the parameters' dtype or a dtype of their own, whatever `torch.set_default_dtype` says.

    Only weights are compared: torch.optim counts steps in the default dtype.
    """
    _expect_indifference(subject, _float64, "under another default dtype", weights_only=True)


@clause(16, "deterministic algorithms change nothing")
def deterministic(subject: Subject) -> None:
    """With `torch.use_deterministic_algorithms` memory starts as NaN, which shows if it is read before it is set."""
    _expect_indifference(subject, _deterministic, "with deterministic algorithms")


def _train_compiled(subject: Subject, backend: Any, count: Callable[[], int] = lambda: 0) -> list[int]:
    """Expect compiled steps, in the last of which lr changes, to train as others do; return the counts after each."""
    torch.compiler.reset()
    eager, run = (subject.start(names=[subject.first], lr=torch.tensor(subject.lr)) for _ in range(2))
    start = run.weights()
    optimizer: Any = SimpleNamespace(step=torch.compile(run.optimizer.step, backend=backend))
    compiled = Run(run.params, optimizer, run.source)
    counts = []
    for k in range(10):
        for each in (run, eager):
            each.set("lr", subject.lr / (1 + max(k - 5, 0)))
        compiled.step(k)
        eager.step(k)
        counts.append(count())
    torch.compiler.reset()
    expect_close(run.weights(), eager.weights(), start, "the same training compiled as uncompiled")
    return counts


def _expect_indifference(subject: Subject, surroundings: Surroundings, where: str, weights_only: bool = False) -> None:
    """Expect the optimizer's work to be the same in some surroundings as in none, bit for bit."""
    seen, expected = _trained(subject, surroundings), _trained(subject, nullcontext)
    if weights_only:
        seen, expected = ({path: x for path, x in all.items() if path.startswith("weight")} for all in (seen, expected))
    expect_same(seen, expected, f"the same training {where}, bit for bit")


def _trained(subject: Subject, surroundings: Surroundings) -> Snapshot:
    """Construct, step, save and load in some surroundings, and return weights and state.

    The first step is taken outside, because torch.optim makes its step counts there, on the default device.
    """
    with surroundings():
        first = subject.start()
    first.step(0)
    with surroundings():
        first.steps(range(1, 4))
        second = carry(first.params, subject.start(), first.optimizer.state_dict())
        second.steps(range(4, 6))
    return second.everything()


@contextmanager
def _float64() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # where there is none, it is no matter of memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
