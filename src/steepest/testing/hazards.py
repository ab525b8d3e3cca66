"""Chapters 11 and 12: gradients that are not finite, or too large to square."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from steepest.testing.clause import NotApplicable, clause
from steepest.testing.evidence import expect, expect_close, expect_finite, expect_same
from steepest.testing.subject import Run, Subject, gradient, seed

HUGE = 1e30
"""A gradient that is finite in float32 and in bfloat16, but whose square is not."""


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
    """When gradients overflow at its scale, the scaler takes no step: weights and state are as before."""
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
    _expect_finite_after(subject, math.nan)


@clause(12, "infinity in a gradient poisons neither weights nor state")
def infinite_gradient(subject: Subject) -> None:
    """As for NaN: one infinite entry makes a norm infinite, and quotients by that norm zero or NaN."""
    _expect_finite_after(subject, math.inf)


@clause(12, "a gradient too large to square poisons neither weights nor state")
def overflow(subject: Subject) -> None:
    """A gradient of 1e30 is finite, its square is not: second moments must not become infinite for good."""
    for at in (0, 2):
        run = subject.start()
        for k in range(4):
            run.set_gradients(k, scale=HUGE if k == at else 1.0)
            run.act()
            expect_finite(run.everything(), f"finite numbers after gradients of {HUGE:g} in step {at}")
        run.expect_training([4], f"training to go on after gradients of {HUGE:g}")


@clause(12, "a bad gradient leaves its own parameter as it was")
def bad_gradient_waits(subject: Subject) -> None:
    """A parameter with NaN in its gradient is left out of the step: weights, state and step count stay bit for bit."""
    (bad,) = subject.one
    run = subject.start()
    run.step(0)
    before = run.of(bad)
    run.step(1, poison={bad: math.nan})
    expect_same(run.of(bad), before, "weights and state of the poisoned parameter as they were")


@clause(12, "a bad gradient leaves the other parameters' training alone")
def bad_gradient_isolated(subject: Subject) -> None:
    """The others' weights and state are bit for bit those of a run in which no gradient was bad."""
    subject.needs_two()
    (bad,) = subject.one
    poisoned, expected = subject.start(), subject.start()
    for k in range(4):
        poisoned.step(k, poison={bad: math.nan} if k in (0, 2) else None)
        expected.step(k)
    others = [name for name in expected.params if name != bad]
    expect_same(poisoned.of(*others), expected.of(*others), "the others to train as if no gradient had been bad")


@clause(12, "a parameter trains on after a bad gradient")
def bad_gradient_resumes(subject: Subject) -> None:
    """With clean gradients the poisoned parameter continues as if the step with the bad one had not been taken."""
    (bad,) = subject.one
    poisoned, expected = subject.start(), subject.start()
    start = poisoned.weights()
    for k in range(6):
        if k in (0, 3):
            poisoned.step(k, poison={bad: math.nan})
        else:
            poisoned.step(k)
            expected.step(k)
    promise = "the poisoned parameter to train on as if nothing had been"
    expect_close(poisoned.weights(bad), expected.weights(bad), start, promise)


def _expect_finite_after(subject: Subject, value: float) -> None:
    """Expect finite numbers after one bad entry, in the first step and in a later one."""
    (bad,) = subject.one
    for at in (0, 2):
        run = subject.start()
        for k in range(4):
            run.step(k, poison={bad: value} if k == at else None)
            expect_finite(run.everything(), f"finite numbers after {value} in a gradient of step {at}")


def _scaler(subject: Subject) -> torch.amp.GradScaler:
    if subject.by_closure:
        raise NotApplicable("GradScaler does not support closures")
    return torch.amp.GradScaler(subject.device.type, init_scale=256.0)


def _scaled_step(run: Run, scaling: torch.amp.GradScaler, k: int, factors: Mapping[str, float]) -> None:
    """Take a step on a loss whose gradient is that of step ``k``, times a factor for some parameters."""
    run.optimizer.zero_grad()
    terms = [(p * gradient(k, name, p) * factors.get(name, 1.0)).sum() for name, p in run.params.items()]
    loss: Tensor = scaling.scale(torch.stack(terms).sum())
    seed(k)
    loss.backward()  # type: ignore[no-untyped-call]
    scaling.step(run.optimizer)
    scaling.update()
