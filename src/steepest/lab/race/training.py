"""The training loop of one trial. What is measured stays outside what is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from steepest.lab.race.meters import UpdateMeter, factor_condition, peak_memory, state_bytes, stopwatch, weight_spread
from steepest.lab.race.poison import Poison
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import Contender, hidden_matrices
from steepest.lab.shared.presets import FINAL_RATE
from steepest.lab.workloads.workload import Workload

VALIDATIONS = 12  # per run
PROBES = 24  # of update size, per run, besides the first steps
SPECTRA = 8  # decompositions of weights and covariances, per run
FIRST_STEPS = (1, 2, 3, 5, 8, 12, 20)  # where an untested step size shows
DIVERGED = 3.0  # times the first loss, as a mean over the last ten steps

Progress = Callable[[dict[str, Any]], None]


def train(trial: Trial, workload: Workload, progress: Progress) -> Record:
    """Run the trial. ``progress`` is told each step's number and loss, and validation losses."""
    rehearse(workload, trial.contender)
    torch.manual_seed(trial.seed)
    model = workload.model()
    data = torch.Generator().manual_seed(trial.seed)
    poison = Poison(trial.poison, trial.seed)
    optimizer = trial.contender.optimizer(model)
    schedule = Schedule(optimizer, trial.contender.warmup, trial.steps)
    lr = trial.contender.lr
    matrices = hidden_matrices(model)
    record = Record(parameters=sum(p.numel() for p in model.parameters()))
    record.clock, clock = stopwatch(model)
    validations, spectra = spread(VALIDATIONS, trial.steps), spread(SPECTRA, trial.steps)
    probes = spread(PROBES, trial.steps) | set(FIRST_STEPS)
    started = time.perf_counter()

    for step in range(1, trial.steps + 1):
        record.rate.append(lr * schedule.set(step))
        start = clock()
        loss = gradients(model, workload, data)
        record.model_seconds.append(clock() - start)
        record.train_loss.append(loss)
        if has_diverged(record.train_loss):
            record.status = "diverged"
            break
        record.poisoned += poison.strike(model.parameters())
        meter = UpdateMeter(matrices) if step in probes else None
        start = clock()
        optimizer.step()
        record.optimizer_seconds.append(clock() - start)
        if meter is not None:
            record.update_rms.append((step, *meter.read(record.rate[-1])))
        if step in validations:
            record.validation.append((step, validate(model, workload)))
        if step in spectra:
            _note(record.weight_spread, step, weight_spread(matrices))
            _note(record.factor_condition, step, factor_condition(optimizer))
        progress({"step": step, "train": loss, "validation": record.validation[-1][1] if record.validation else None})

    if not math.isfinite(record.final):
        record.status = "diverged"
    _drop_nonfinite(record)
    record.state_bytes, record.peak_memory = state_bytes(optimizer), peak_memory()
    record.skipped = getattr(optimizer, "skipped", None)
    record.wall_seconds = time.perf_counter() - started
    return record


class Schedule:
    """The learning rate rises over the warm-up, then falls along a cosine to a hundredth."""

    def __init__(self, optimizer: Optimizer, warmup: float, steps: int) -> None:
        self.groups = optimizer.param_groups
        self.highest = [group["lr"] for group in self.groups]
        self.rise, self.steps = warmup * steps, steps

    def factor(self, step: int) -> float:
        """What the highest rate is multiplied by in ``step``, counted from 1."""
        if step <= self.rise:
            return step / self.rise
        left = (1 + math.cos(math.pi * (step - self.rise) / (self.steps - self.rise))) / 2
        return FINAL_RATE + (1 - FINAL_RATE) * left

    def set(self, step: int) -> float:
        """Set all groups' rates for ``step``; return the factor."""
        factor = self.factor(step)
        for group, highest in zip(self.groups, self.highest, strict=True):
            group["lr"] = highest * factor
        return factor


def gradients(model: nn.Module, workload: Workload, data: torch.Generator) -> float:
    """One batch, forward and backward; its loss."""
    loss = workload.loss(model, workload.batch(data))
    model.zero_grad()
    torch.autograd.backward(loss)
    return loss.item()


def rehearse(workload: Workload, contender: Contender) -> None:
    """One step on a model that is thrown away: what is imported and allocated on first use is not billed to a step."""
    model = workload.model()
    optimizer = contender.optimizer(model)
    gradients(model, workload, torch.Generator().manual_seed(0))
    optimizer.step()


@torch.no_grad()
def validate(model: nn.Module, workload: Workload) -> float:
    """The validation loss, in eval mode."""
    model.eval()
    loss = workload.validation(model)
    model.train()
    return float(loss)


def spread(count: int, steps: int) -> set[int]:
    """About ``count`` steps, evenly spaced, the last among them.

    >>> sorted(spread(4, 10))
    [2, 5, 8, 10]
    """
    return {round(steps * i / count) for i in range(1, count + 1)} - {0}


def has_diverged(losses: list[float]) -> bool:
    """Whether the loss is no number any more, or has stayed far above where it began.

    >>> has_diverged([4.5, 4.0, 30.0]), has_diverged([4.5] + [30.0] * 10), has_diverged([float("nan")])
    (False, True, True)
    """
    if not math.isfinite(losses[-1]):
        return True
    recent = losses[-10:]
    return len(losses) > 10 and fmean(recent) > DIVERGED * losses[0] > 0


def _note(series: list[tuple[int, float]], step: int, value: float | None) -> None:
    if value is not None:
        series.append((step, value))


def _drop_nonfinite(record: Record) -> None:
    """JSON has no infinities: a diverged run ends where its numbers do."""
    record.train_loss = [loss for loss in record.train_loss if math.isfinite(loss)]
    for name in ("validation", "update_rms", "weight_spread", "factor_condition"):
        setattr(record, name, [row for row in getattr(record, name) if all(map(math.isfinite, row))])
