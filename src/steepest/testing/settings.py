"""Chapter 2: options that every step reads again, because schedulers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from steepest.testing.clause import clause
from steepest.testing.evidence import expect, expect_close, expect_moved
from steepest.testing.subject import Subject

Build = Callable[[Optimizer, float], Any]
"""A function that returns a scheduler of an optimizer with this learning rate."""

SCHEDULERS: dict[str, Build] = {
    "LambdaLR": lambda o, lr: lr_scheduler.LambdaLR(o, lambda k: 0.5**k),
    "MultiplicativeLR": lambda o, lr: lr_scheduler.MultiplicativeLR(o, lambda k: 0.5),
    "StepLR": lambda o, lr: lr_scheduler.StepLR(o, 1),
    "MultiStepLR": lambda o, lr: lr_scheduler.MultiStepLR(o, [2]),
    "ConstantLR": lambda o, lr: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o, lr: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o, lr: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o, lr: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o, lr: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o, lr: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ChainedScheduler": lambda o, lr: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.5)], o),
    "SequentialLR": lambda o, lr: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [1]
    ),
    "ReduceLROnPlateau": lambda o, lr: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "OneCycleLR": lambda o, lr: lr_scheduler.OneCycleLR(o, max_lr=lr, total_steps=5, cycle_momentum=False),
    "CyclicLR": lambda o, lr: lr_scheduler.CyclicLR(o, lr / 2, lr, step_size_up=2, cycle_momentum=False),
}
"""All schedulers of torch.optim.lr_scheduler, with settings for a few steps."""

CYCLES: dict[str, Build] = {
    "OneCycleLR": lambda o, lr: lr_scheduler.OneCycleLR(o, max_lr=lr, total_steps=5),
    "CyclicLR": lambda o, lr: lr_scheduler.CyclicLR(o, lr / 2, lr, step_size_up=2),
}
"""The schedulers that cycle the momentum, unless they are told not to."""


@clause(2, "the learning rate is re-read at every step", needs=("lr",))
def lr_reread(subject: Subject) -> None:
    """A learning rate that a scheduler writes into ``group["lr"]`` holds from the next step on."""
    _changes(subject, "lr", subject.lr / 2)


@clause(2, "betas and momentum are re-read at every step", needs=("betas", "momentum"))
def betas_reread(subject: Subject) -> None:
    """Decays that OneCycleLR writes into ``group["betas"]`` or ``group["momentum"]`` hold from the next step on."""
    if "betas" in subject.defaults:
        _changes(subject, "betas", (0.5, *tuple(subject.defaults["betas"])[1:]))
    if "momentum" in subject.defaults:
        _changes(subject, "momentum", 0.5)


@clause(2, "weight decay is re-read at every step", needs=("weight_decay",))
def decay_reread(subject: Subject) -> None:
    """A weight decay that a schedule writes into ``group["weight_decay"]`` holds from the next step on."""
    _changes(subject, "weight_decay", 0.5 + (subject.defaults["weight_decay"] or 0.0))


@clause(2, "the learning rate may be a tensor", needs=("lr",))
def tensor_lr(subject: Subject) -> None:
    """A tensor trains like the number in it, and is read again at every step: changing it costs no recompilation."""
    expected, run = subject.start(), subject.start(lr=torch.tensor(subject.lr))
    start = run.weights()
    for each in (expected, run):
        each.steps(range(2))
        each.set("lr", subject.lr / 2)
        each.steps(range(2, 4))
    expect_close(run.weights(), expected.weights(), start, "a tensor lr to train like the number in it")


@clause(2, "every scheduler of torch.optim runs", needs=("lr",))
def schedulers(subject: Subject) -> None:
    """Each of torch's learning rate schedulers takes the optimizer, and sets the rate of its next step."""
    for name, build in SCHEDULERS.items():
        metrics = [1.0] if name == "ReduceLROnPlateau" else []
        _follows(subject, name, build, "the rate", lambda group: float(group["lr"]), *metrics)


@clause(2, "OneCycleLR and CyclicLR cycle the momentum", needs=("betas", "momentum"))
def cycled_momentum(subject: Subject) -> None:
    """Both schedulers move ``betas`` or ``momentum`` against the learning rate, and refuse optimizers with neither."""
    for name, build in CYCLES.items():
        read = lambda group: group["betas"][0] if "betas" in group else group["momentum"]  # noqa: E731
        _follows(subject, name, build, "the momentum", read)


def _follows(
    subject: Subject, name: str, build: Build, what: str, read: Callable[[dict[str, Any]], float], *metrics: float
) -> None:
    """Expect a scheduler to change what is read from a group, and the weights to move."""
    run = subject.start(names=[subject.first])
    start, scheduler, seen = run.weights(), build(run.optimizer, subject.lr), set()
    for k in range(4):
        run.step(k)
        scheduler.step(*metrics)
        seen.add(read(run.optimizer.param_groups[0]))
    expect(len(seen) > 1, f"{name} to change {what}", f"{seen} all the time")
    expect_moved(run.weights(), start, f"training under {name}")


def _changes(subject: Subject, option: str, value: Any) -> None:
    """Expect a changed option to change the next two steps."""
    unchanged, changed = (subject.start(names=[subject.first]) for _ in range(2))
    for run in (unchanged, changed):
        run.steps([0, 2])
    changed.set(option, value)
    for run in (unchanged, changed):
        run.steps([3, 4])
    promise = f"{option}={value} to change the steps after it was written into the group"
    ((one,), (other,)) = (run.weights().values() for run in (unchanged, changed))
    expect(not torch.equal(one, other), promise, "the same steps as without")
