"""Chapters 11 and 12: gradients that are not finite, or too large to square."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from steepest.testing.clause import Broken, NotApplicable, clause
from steepest.testing.evidence import (
    expect,
    expect_close,
    expect_finite,
    expect_moved,
    expect_same,
    one_line,
    snapshot,
)
from steepest.testing.subject import Run, Subject, gradient, seed

HUGE = 1e30
"""A gradient that is finite in float32 and in bfloat16, and whose square is not."""


@clause(11, "torch.amp.GradScaler trains as without it")
def scaler(subject: Subject) -> None:
    """Losses scaled by a power of two and gradients unscaled again give the same steps."""
    expected, run = subject.start(), subject.start()
    start = run.weights()
    scaling = _scaler(subject)
    for k in range(3):
        _scaled_step(run, scaling, k, {})
        expected.step(k)
    expect_close(run.weights(), expected.weights(), start, "the same training with GradScaler as without")


@clause(11, "a step that GradScaler skips leaves no trace")
def skipped_by_scaler(subject: Subject) -> None:
    """When gradients overflow at its scale, the scaler calls no step: weights and state are as before."""
    run = subject.start()
    scaling = _scaler(subject)
    _scaled_step(run, scaling, 0, {})
    before, scale = run.everything(), scaling.get_scale()
    _scaled_step(run, scaling, 1, dict.fromkeys(run.params, math.inf))
    expect(scaling.get_scale() < scale, "the scaler to see the overflow", "no smaller scale")
    expect_same(run.everything(), before, "no trace of a step that the scaler skipped")


@clause(12, "NaN in a gradient poisons neither weights nor state")
def nan_gradient(subject: Subject) -> None:
    """One bad batch must not end a run: all numbers stay finite, at the first step and later."""
    _stays_finite(subject, math.nan)


@clause(12, "infinity in a gradient poisons neither weights nor state")
def infinite_gradient(subject: Subject) -> None:
    """As for NaN; one infinite entry makes a norm infinite, and whatever is divided by it zero or NaN."""
    _stays_finite(subject, math.inf)


@clause(12, "a gradient too large to square poisons neither weights nor state")
def overflow(subject: Subject) -> None:
    """A gradient of 1e30 is finite, its square is not: second moments must not become infinite for good."""
    for at in (0, 2):
        run = subject.start()
        for k in range(4):
            run.set_gradients(k, scale=HUGE if k == at else 1.0)
            run.act()
            expect_finite(run.everything(), f"finite numbers after gradients of {HUGE:g} in step {at}")
        before = run.weights()
        run.step(4)
        expect_moved(run.weights(), before, f"training to go on after gradients of {HUGE:g}")


@clause(12, "a bad gradient leaves its own parameter as it was")
def bad_gradient_waits(subject: Subject) -> None:
    """A parameter with NaN in its gradient sits the step out: weights, state and step count stay bit for bit."""
    (bad,) = subject.one
    run = subject.start()
    run.step(0)
    before = snapshot({"weight": run.params[bad], "state": run.optimizer.state.get(run.params[bad], {})})
    _poisoned_step(run, 1, {bad: math.nan})
    after = snapshot({"weight": run.params[bad], "state": run.optimizer.state.get(run.params[bad], {})})
    expect_same(after, before, "weights and state of the poisoned parameter as they were")


@clause(12, "a bad gradient leaves the other parameters' training alone")
def bad_gradient_isolated(subject: Subject) -> None:
    """The others' weights and state are bit for bit those of a run in which no gradient was bad."""
    subject.needs_two()
    (bad,) = subject.one
    poisoned, expected = subject.start(), subject.start()
    for k in range(4):
        if k in (0, 2):
            _poisoned_step(poisoned, k, {bad: math.nan})
        else:
            poisoned.step(k)
        expected.step(k)
    seen, wanted = (
        snapshot({n: {"weight": p, "state": run.optimizer.state.get(p, {})} for n, p in run.params.items() if n != bad})
        for run in (poisoned, expected)
    )
    expect_same(seen, wanted, "the others to train as if no gradient had been bad")


@clause(12, "a parameter trains on after a bad gradient")
def bad_gradient_resumes(subject: Subject) -> None:
    """With clean gradients the poisoned parameter goes on as if the bad one had never been."""
    (bad,) = subject.one
    poisoned, expected = subject.start(), subject.start()
    start = poisoned.weights()
    for k in range(6):
        if k in (0, 3):
            _poisoned_step(poisoned, k, {bad: math.nan})
        else:
            poisoned.step(k)
            expected.step(k)
    seen, wanted = ({bad: run.weights()[bad]} for run in (poisoned, expected))
    expect_close(seen, wanted, start, "the poisoned parameter to train on as if nothing had been")


def _stays_finite(subject: Subject, value: float) -> None:
    """Expect finite numbers after one bad entry, in the first step and in a later one."""
    (bad,) = subject.one
    for at in (0, 2):
        run = subject.start()
        for k in range(4):
            if k == at:
                _poisoned_step(run, k, {bad: value})
            else:
                run.step(k)
            expect_finite(run.everything(), f"finite numbers after {value} in a gradient of step {at}")


def _poisoned_step(run: Run, k: int, poison: Mapping[str, float]) -> None:
    try:
        run.step(k, poison=poison)
    except Exception as error:
        raise Broken(f"expected the step to be taken without the bad gradient; saw {one_line(error)}") from error


def _scaler(subject: Subject) -> torch.amp.GradScaler:
    if subject.by_closure:
        raise NotApplicable("GradScaler does not support closures")
    return torch.amp.GradScaler(subject.device.type, init_scale=256.0)


def _scaled_step(run: Run, scaling: torch.amp.GradScaler, k: int, factors: Mapping[str, float]) -> None:
    """A step by the book, on a loss whose gradient is that of step ``k``, times a factor for some parameters."""
    run.optimizer.zero_grad()
    terms = [(p * gradient(k, name, p) * factors.get(name, 1.0)).sum() for name, p in run.params.items()]
    loss: Tensor = scaling.scale(torch.stack(terms).sum())
    seed(k)
    loss.backward()  # type: ignore[no-untyped-call]
    scaling.step(run.optimizer)
    scaling.update()
