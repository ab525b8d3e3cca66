"""Training as a race does it, in the process of a test, where starting another takes longer than training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from steepest.lab.race.pool import Pool
from steepest.lab.race.training import train
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import parse_contenders
from steepest.lab.workloads.workload import load_workload


class Here(Pool):
    """A pool that trains in this process, one trial after the other."""

    def run(self, trials: Iterable[Trial], ended: Callable[[Trial, Record], None]) -> None:
        for trial in trials:
            self.bars.started(trial)
            record = train(trial, load_workload(trial.workload), lambda message: None)
            ended(trial, Record(**record.as_json()))  # rounded, as processes send it


def loss_after(workload, steps: int, contender: str) -> tuple[float, float]:
    """The validation loss before and after some steps."""
    torch.manual_seed(0)
    model = workload.model()
    optimizer = parse_contenders(contender)[0].optimizer(model)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps + 1):
        if step in (0, steps):
            model.eval()
            with torch.no_grad():
                losses.append(workload.validation(model))
            model.train()
        optimizer.zero_grad()
        workload.loss(model, workload.batch(generator)).backward()
        optimizer.step()
    return losses[0], losses[1]
