from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steepest.lab.contenders import Contender, preset
from steepest.lab.race import Entry, Plan, Results
from steepest.lab.trial import Record, Run, Trial

QUICK_TASK = """
import time
import torch
from torch import nn
from steepest.lab import Workload

class Quick(Workload):
    steps = 4

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def batch(self, generator):
        return torch.randn(8, 4, generator=generator)

    def loss(self, model, batch):
        time.sleep({pause})
        return (model(batch) - batch[:, :2]).square().mean()

    def validation(self, model):
        return self.loss(model, torch.ones(1, 4)).item()
"""


@pytest.fixture
def quick_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a workload file; its steps take ``pause`` seconds."""

    def write(pause: float = 0.0) -> Path:
        path = tmp_path / "quick_task.py"
        path.write_text(QUICK_TASK.format(pause=pause))
        return path

    return write


def _record(final: float, steps: int = 10, status: str = "finished", optimizer_ms: float = 1.0) -> Record:
    """A run that comes down to ``final`` in a straight line from 3 above it."""
    losses = [final + 3 * (1 - i / steps) for i in range(1, steps + 1)]
    return Record(
        status=status,
        train_loss=losses,
        rate=[0.1] * steps,
        model_seconds=[0.01] * steps,
        optimizer_seconds=[optimizer_ms / 1e3] * steps,
        validation=[(i + 1, loss) for i, loss in enumerate(losses)],
        update_rms=[(1, 0.5, 1.0), (steps, 0.2, 0.3)],
        weight_spread=[(steps, 4.0)],
        factor_condition=[(steps, 1e4)],
        parameters=100,
        state_bytes=800,
        peak_memory=10**8,
        wall_seconds=1.0,
        clock="CPU time",
    )


def _results(plan: Plan, final: Callable[[Trial], float], **fields: object) -> Results:
    """A race in which every trial of the plan was run, with these final losses; infinite ones diverged."""
    found = Results(plan)

    def run(trials: list[Trial]) -> None:
        for trial in trials:
            loss = final(trial)
            status = "finished" if loss < float("inf") else "diverged"
            found.runs.append(Run(trial, _record(min(loss, 9.0), trial.steps, status, **fields)))

    run(plan.tuning())
    run(plan.finals([best for entry in plan.entries if (best := found.best(entry)) is not None]))
    return found


def _plan(*names: str, steps: int = 10, seeds: int = 2, shorter: tuple[int, ...] = (), swept: bool = False) -> Plan:
    make: Callable[[Contender], Entry] = Entry.swept if swept else Entry.preset
    return Plan("digits", tuple(make(preset(name)) for name in names), steps, seeds, shorter)


@pytest.fixture
def make_record() -> Callable[..., Record]:
    return _record


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    return _plan


@pytest.fixture
def make_results() -> Callable[..., Results]:
    return _results
