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

from steepest.lab.race.meters import peak_memory, state_bytes, stopwatch
from steepest.lab.race.poison import Poison
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.presets import FINAL_RATE
from steepest.lab.workloads.workload import Workload

VALIDATIONS = 12
"""Validations in a run."""
DIVERGED = 3.0
"""A run has diverged when its mean loss over ten steps is more than so many times the first loss."""


def train(trial: Trial, workload: Workload, progress: Callable[[dict[str, Any]], None]) -> Record:
    """Run the trial, and call ``progress`` after each step with its number, its loss and the last validation loss."""
    rehearse(workload, trial.contender)
    torch.manual_seed(trial.seed)
    model = workload.model()
    data = torch.Generator().manual_seed(trial.seed)
    poison = Poison(trial.poison, trial.seed)
    optimizer = trial.contender.optimizer(model)
    schedule = Schedule(optimizer, trial.contender.warmup, trial.steps)
    record = Record(parameters=sum(p.numel() for p in model.parameters()))
    record.clock, clock = stopwatch(model)
    validations = evenly_spaced(VALIDATIONS, trial.steps)
    started = time.perf_counter()

    for step in range(1, trial.steps + 1):
        schedule.set(step)
        start = clock()
        loss = gradients(model, workload, data)
        record.model_seconds.append(clock() - start)
        record.train_loss.append(loss)
        if has_diverged(record.train_loss):
            record.status = "diverged"
            break
        record.poisoned += poison.apply(model.parameters())
        start = clock()
        optimizer.step()
        record.optimizer_seconds.append(clock() - start)
        if step in validations:
            record.validation.append((step, validate(model, workload)))
        progress({"step": step, "train": loss, "validation": record.validation[-1][1] if record.validation else None})

    if not math.isfinite(record.final):
        record.status = "diverged"
    # A diverged run has samples at its end that are not finite, which JSON does not allow.
    record.train_loss = [loss for loss in record.train_loss if math.isfinite(loss)]
    record.validation = [row for row in record.validation if math.isfinite(row[1])]
    record.state_bytes, record.peak_memory = state_bytes(optimizer), peak_memory()
    record.skipped = getattr(optimizer, "skipped", None)
    record.wall_seconds = time.perf_counter() - started
    return record


class Schedule:
    """A learning rate that rises linearly over the warm-up, then falls along a cosine to a hundredth."""

    def __init__(self, optimizer: Optimizer, warmup: float, steps: int) -> None:
        self.groups = optimizer.param_groups
        self.highest = [group["lr"] for group in self.groups]
        self.rise, self.steps = warmup * steps, steps

    def factor(self, step: int) -> float:
        """Return the factor on the highest rate in ``step``, counted from 1."""
        if step <= self.rise:
            return step / self.rise
        left = (1 + math.cos(math.pi * (step - self.rise) / (self.steps - self.rise))) / 2
        return FINAL_RATE + (1 - FINAL_RATE) * left

    def set(self, step: int) -> None:
        """Set the rates of all groups for ``step``."""
        factor = self.factor(step)
        for group, highest in zip(self.groups, self.highest, strict=True):
            group["lr"] = highest * factor


def gradients(model: nn.Module, workload: Workload, data: torch.Generator) -> float:
    """Run one batch forward and backward, and return its loss."""
    loss = workload.loss(model, workload.batch(data))
    model.zero_grad()
    torch.autograd.backward(loss)
    return loss.item()


def rehearse(workload: Workload, contender: Contender) -> None:
    """Run one step on a model that is thrown away, so that imports and first allocations count for no step's time."""
    model = workload.model()
    optimizer = contender.optimizer(model)
    gradients(model, workload, torch.Generator().manual_seed(0))
    optimizer.step()


@torch.no_grad()
def validate(model: nn.Module, workload: Workload) -> float:
    """Return the validation loss, in eval mode."""
    model.eval()
    loss = workload.validation(model)
    model.train()
    return float(loss)


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
