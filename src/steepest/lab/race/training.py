"""The training loop of one trial. Measurements are taken outside of the parts that are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from steepest.lab.race.meters import Allocations, state_bytes, stopwatch
from steepest.lab.race.poison import Poison
from steepest.lab.race.stepping import stepper
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.presets import FINAL_RATE
from steepest.lab.workloads.workload import Workload

VALIDATIONS = 12
"""Validations in a run."""
DIVERGED = 3.0
"""A run has diverged when its mean loss over ten steps is more than so many times the first loss."""


def train(trial: Trial, workload: Workload, progress: Callable[[dict[str, Any]], None]) -> Record:
    """Run the trial, and call ``progress`` after each step with what is done, its loss and the last validation loss.

    What is done is a number of steps, or of seconds in a race over time. Then the learning rate follows the time, too.
    """
    rehearse(workload, trial.contender)  # first, because memory that a process keeps for all its steps does not count
    peak = peak_memory(workload, trial.contender)
    torch.manual_seed(trial.seed)
    model = workload.model()
    poison = Poison(trial.poison, trial.seed)
    optimizer = trial.contender.optimizer(model)
    # With `eval` and `train` it moves the weights to an average that it keeps, and back.
    averaging: Any = optimizer if hasattr(optimizer, "eval") else None
    way = stepper(model, optimizer, workload, torch.Generator().manual_seed(trial.seed))
    schedule = (
        Schedule(optimizer, trial.contender.warmup, trial.length, falls=averaging is None) if way.scheduled else None
    )
    record = Record(parameters=sum(p.numel() for p in model.parameters()), own_passes=way.own_passes)
    record.clock, clock = stopwatch(model)
    marks, done, step = validation_marks(trial), 0.0, 0
    started = time.perf_counter()

    while done < trial.length:
        step += 1
        if schedule is not None:
            schedule.set(end_of_step(step, done, trial))
        start = clock()
        loss = way.prepare()
        record.model_seconds.append(clock() - start)
        if loss is None or not has_diverged([*record.train_loss, loss]):
            record.poisoned += poison.apply(model.parameters())
            start = clock()
            loss = way.step()
            record.optimizer_seconds.append(clock() - start)
        record.train_loss.append(loss)
        if has_diverged(record.train_loss):
            record.status = "diverged"
            break
        done += record.model_seconds[-1] + record.optimizer_seconds[-1] if trial.seconds else 1
        if passed := sum(mark <= done for mark in marks):  # a long step may pass several
            if averaging is not None:
                averaging.eval()
            record.validation += [(step, validate(model, workload))] * passed
            if averaging is not None:
                averaging.train()
            marks = marks[passed:]
        progress({"done": done, "train": loss, "validation": record.validation[-1][1] if record.validation else None})

    if not math.isfinite(record.final):
        record.status = "diverged"
    # A diverged run has samples at its end that are not finite, which JSON does not allow.
    record.train_loss = [loss for loss in record.train_loss if math.isfinite(loss)]
    record.validation = [row for row in record.validation if math.isfinite(row[1])]
    record.state_bytes = state_bytes(optimizer)
    record.peak_memory = max(peak, record.state_bytes)
    record.skipped = getattr(optimizer, "skipped", None)
    record.wall_seconds, record.cpu_seconds = time.perf_counter() - started, time.process_time()
    return record


class Schedule:
    """A learning rate that rises linearly over the warm-up, then falls along a cosine to a hundredth, or stays."""

    def __init__(self, optimizer: Optimizer, warmup: float, length: float, falls: bool = True) -> None:
        self.falls = falls
        self.groups = optimizer.param_groups
        self.highest = [group["lr"] for group in self.groups]
        self.rise, self.length = warmup * length, length

    def factor(self, end: float) -> float:
        """Return the factor on the highest rate in the step that ends after so many steps, or seconds."""
        if end <= self.rise:
            return end / self.rise
        if not self.falls:
            return 1.0
        left = (1 + math.cos(math.pi * (end - self.rise) / (self.length - self.rise))) / 2
        return FINAL_RATE + (1 - FINAL_RATE) * left

    def set(self, end: float) -> None:
        """Set the rates of all groups for the step that ends there."""
        factor = self.factor(end)
        for group, highest in zip(self.groups, self.highest, strict=True):
            group["lr"] = highest * factor


def end_of_step(step: int, done: float, trial: Trial) -> float:
    """Return the step's number or, in a race over time, when it will end if it takes as long as those before.

    >>> from steepest.lab.shared.contenders import preset
    >>> end_of_step(3, 2.0, Trial("gpt", preset("adamw"), steps=10, seed=0))
    3
    >>> end_of_step(3, 2.0, Trial("gpt", preset("adamw"), steps=0, seed=0, seconds=12.0))
    3.0
    """
    if not trial.seconds:
        return step
    return min(done + (done / (step - 1) if done else trial.seconds / 1000), trial.seconds)


def rehearse(workload: Workload, contender: Contender) -> None:
    """Run one step on a model that is thrown away, so that imports and first allocations count for no step's time."""
    model = workload.model()
    way = stepper(model, contender.optimizer(model), workload, torch.Generator().manual_seed(0))
    way.prepare()
    way.step()


def peak_memory(workload: Workload, contender: Contender) -> int:
    """Return the bytes that an optimizer's construction and first step hold at once, on a model that is thrown away."""
    model = workload.model()
    with Allocations() as construction:
        optimizer = contender.optimizer(model)
    held: int = state_bytes(optimizer)
    way = stepper(model, optimizer, workload, torch.Generator().manual_seed(0))
    way.prepare()
    with Allocations() as step:
        way.step()
    peak: int = max(construction.peak, held + step.peak)
    return peak


@torch.no_grad()
def validate(model: nn.Module, workload: Workload) -> float:
    """Return the validation loss, in eval mode."""
    model.eval()
    loss = workload.validation(model)
    model.train()
    return float(loss)


def validation_marks(trial: Trial) -> list[float]:
    """Return the steps, or seconds, after which the trial is validated; the last is its end."""
    if trial.seconds:
        return [trial.seconds * i / VALIDATIONS for i in range(1, VALIDATIONS + 1)]
    return sorted(evenly_spaced(VALIDATIONS, trial.steps))


def evenly_spaced(count: int, steps: int) -> set[int]:
    """Return about ``count`` steps, evenly spaced, the last one among them.

    >>> sorted(evenly_spaced(4, 10))
    [2, 5, 8, 10]
    """
    return {round(steps * i / count) for i in range(1, count + 1)} - {0}


def has_diverged(losses: list[float]) -> bool:
    """Return whether the last loss is not finite, or the last ten are far above the first.

    >>> has_diverged([4.5, 4.0, 30.0]), has_diverged([4.5] + [30.0] * 10), has_diverged([float("nan")])
    (False, True, True)
    """
    if not math.isfinite(losses[-1]):
        return True
    recent = losses[-10:]
    return len(losses) > 10 and fmean(recent) > DIVERGED * losses[0] > 0
