"""Chapters 4, 11 and 12: gradients that are missing, scaled, not finite, or too large to square."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from steepest.testing.draws import seed
from steepest.testing.evidence import (
    NotApplicable,
    Snapshot,
    expect,
    expect_close,
    expect_finite,
    expect_moved,
    expect_same,
)
from steepest.testing.run import Run
from steepest.testing.sources import Batch
from steepest.testing.subject import Subject, clause

HUGE = 1e30
"""A gradient that is finite in float32 and in bfloat16, but whose square is not."""


@clause(4, "a parameter without a gradient is skipped", several=True)
def missing_gradient(subject: Subject) -> None:
    """A parameter whose ``grad`` is None stays as it is, without decay too: it had no part in the loss."""
    run = subject.start()
    before, start = run.weights(subject.first), run.weights(*subject.others)
    for k in range(3):
        run.step(k, missing=[subject.first])
    expect_same(run.weights(subject.first), before, "no change without a gradient")
    expect_moved(run.weights(*subject.others), start, "the others to train")


@clause(4, "a step without any gradient does nothing")
def no_gradients(subject: Subject) -> None:
    """A step in which no parameter has a gradient changes nothing and raises nothing, first or later."""
    run = subject.start()
    run.step(0, missing=run.params)
    expect_same(run.weights(), subject.params(), "no change in a first step without gradients")
    run.step(1)
    before = lasting(subject, run)
    run.step(2, missing=run.params)
    expect_same(lasting(subject, run), before, "no change in a step without gradients")


@clause(4, "a gradient that is missing on some steps leaves weights and state alone", several=True, each=True)
def missing_leaves_state(subject: Subject) -> None:
    """Weights, state and step count stay bit for bit in steps without a gradient, as of experts without tokens."""
    _expect_waiting(subject, "missing", missing=[subject.first])


@clause(4, "a gradient that is missing on some steps leaves the clock alone", several=True, alone=True)
def missing_leaves_clock(subject: Subject) -> None:
    """Steps without a parameter's gradient do not count for it: its bias correction counts its own updates."""
    _expect_resuming(subject, "missing", at=(0, 2, 3), missing=[subject.first])


@clause(11, "torch.amp.GradScaler trains as without it")
def scaler(subject: Subject) -> None:
    """Losses scaled by a power of two and gradients unscaled again give the same steps."""
    expected, (run, scaling) = subject.start(), _scaled(subject)
    start = run.weights()
    for k in range(3):
        _scaled_step(run, scaling, k)
        expected.step(k)
    expect_close(run.weights(), expected.weights(), start, "the same training with GradScaler as without")


@clause(11, "a step that GradScaler skips leaves no trace")
def skipped_by_scaler(subject: Subject) -> None:
    """When gradients overflow at its scale, the scaler takes no step: weights and state are as before."""
    expected, (run, scaling) = subject.start(), _scaled(subject)
    start = run.weights()
    expected.step(0)
    _scaled_step(run, scaling, 0)
    before, scale = run.everything(), scaling.get_scale()
    _scaled_step(run, scaling, 1, factor=math.inf)
    expect(scaling.get_scale() < scale, "the scaler to see the overflow", "no smaller scale")
    expect_same(run.everything(), before, "no trace of a step that the scaler skipped")
    for k in (2, 3):
        _scaled_step(run, scaling, k)
        expected.step(k)
    expect_close(run.weights(), expected.weights(), start, "the same training as without the step that was skipped")


@clause(12, "NaN in a gradient poisons neither weights nor state")
def nan_gradient(subject: Subject) -> None:
    """One bad batch must not end a run: all numbers stay finite, at the first step and later."""
    for at in (0, 2):
        _train_through(subject, at, f"nan in a gradient of step {at}", poison={subject.first: math.nan})


@clause(12, "infinity in a gradient poisons neither weights nor state")
def infinite_gradient(subject: Subject) -> None:
    """As for NaN: one infinite entry makes a norm infinite, and quotients by that norm zero or NaN."""
    for at in (0, 2):
        _train_through(subject, at, f"inf in a gradient of step {at}", poison={subject.first: math.inf})


@clause(12, "a gradient too large to square poisons neither weights nor state")
def overflow(subject: Subject) -> None:
    """A gradient of 1e30 is finite, its square is not: second moments must not become infinite for good."""
    for at in (0, 2):
        run = _train_through(subject, at, f"gradients of {HUGE:g} in step {at}", scale=HUGE)
        run.expect_training([4], f"training to go on after gradients of {HUGE:g}")


@clause(12, "a bad gradient leaves its own parameter as it was")
def bad_gradient_waits(subject: Subject) -> None:
    """A parameter with NaN in its gradient is left out of the step: weights, state and step count stay bit for bit.

    Where the closure of a step is evaluated, and all parameters move as one vector, all weights stay.
    """
    _expect_waiting(subject, "bad", poison={subject.first: math.nan})


@clause(12, "a bad gradient leaves the other parameters' training alone", several=True, alone=True)
def bad_gradient_isolated(subject: Subject) -> None:
    """The others' weights and state are bit for bit those of a run in which no gradient was bad."""
    poisoned, expected = subject.start(), subject.start()
    for k in range(4):
        poisoned.step(k, poison={subject.first: math.nan} if k in (0, 2) else {})
        expected.step(k)
    seen, others = poisoned.everything(*subject.others), expected.everything(*subject.others)
    expect_same(seen, others, "the others to train as if no gradient had been bad")


@clause(12, "a parameter trains on after a bad gradient", alone=True)
def bad_gradient_resumes(subject: Subject) -> None:
    """With clean gradients the poisoned parameter continues as if the step with the bad one had not been taken."""
    _expect_resuming(subject, "bad", at=(0, 3), poison={subject.first: math.nan})


def lasting(subject: Subject, run: Run, *names: str) -> Snapshot:
    """Return what a step that can't be taken leaves as it is: these weights and their state, by default all.

    Where all parameters have one state, it may count the attempt, and all weights must stay.
    """
    return run.weights() if subject.joint else run.everything(*names)


def _expect_waiting(subject: Subject, what: str, **bad: Any) -> None:
    """Expect weights and state of a parameter to stay in steps in which its gradient is missing or bad."""
    run = subject.start()
    run.step(0)
    before = lasting(subject, run, subject.first)
    for k in (1, 2):
        run.step(k, **bad)
        expect_same(
            lasting(subject, run, subject.first), before, f"weights and state to stay while the gradient is {what}"
        )


def _expect_resuming(subject: Subject, what: str, at: Collection[int], **bad: Any) -> None:
    """Expect a parameter to train as without the steps in which its gradient was missing or bad."""
    run, expected = subject.start(), subject.start()
    start = run.weights()
    for k in range(6):
        if k in at:
            run.step(k, **bad)
        else:
            run.step(k)
            expected.step(k)
    promise = f"the same training as without the steps in which the gradient was {what}"
    expect_close(run.weights(subject.first), expected.weights(subject.first), start, promise)


def _train_through(subject: Subject, at: int, what: str, **bad: Any) -> Run:
    """Return a run with a bad gradient in one step, whose numbers stayed finite."""
    run = subject.start()
    for k in range(4):
        run.step(k, **bad if k == at else {})
        expect_finite(run.everything(), f"finite numbers after {what}")
    return run


def _scaled(subject: Subject) -> tuple[Run, torch.amp.GradScaler]:
    """Return a run and its scaler, of which the optimizer is told if it asks."""
    if subject.by_closure:
        raise NotApplicable("GradScaler does not support closures")
    scaling = torch.amp.GradScaler(subject.device.type, init_scale=256.0)
    told: dict[str, Any] = {"grad_scaler": scaling} if "grad_scaler" in subject.arguments else {}
    return subject.start(**told), scaling


def _scaled_step(run: Run, scaling: torch.amp.GradScaler, k: int, factor: float = 1.0) -> None:
    """Take a step on a loss whose gradient is that of step ``k``, times a factor."""
    run.optimizer.zero_grad()
    run.batch = Batch(k)
    loss: Tensor = scaling.scale(run.source.loss(run.params, run.batch, run.optimizer) * factor)
    seed(k)
    loss.backward()  # type: ignore[no-untyped-call]
    scaling.step(run.optimizer)
    scaling.update()
