from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from steepest.lab.race import meters
from steepest.lab.race.training import Schedule, train
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import parse_contenders, preset
from steepest.lab.workloads.workload import load_workload


@pytest.fixture(autouse=True)
def one_thread():
    """As in a race."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(quick_task):
    workload = load_workload(str(quick_task()))

    def run(spec: str, steps: int = 6, seed: int = 0) -> Record:
        (contender,) = parse_contenders(spec)
        return train(Trial("quick", contender, steps, seed), workload, lambda news: None)

    return run


def test_the_same_trial_gives_the_same_losses(run) -> None:
    first, second = run("soap"), run("soap")
    assert first.train_loss == second.train_loss
    assert first.validation == second.validation


def test_contenders_of_one_seed_start_alike_and_see_the_same_batches(run) -> None:
    adamw, soap, other = run("adamw(lr=1e-12)"), run("soap(lr=1e-12, elementwise={'lr': 1e-12})"), run("adamw", seed=1)
    assert adamw.train_loss[0] == soap.train_loss[0] != other.train_loss[0]
    assert adamw.train_loss == pytest.approx(soap.train_loss, rel=1e-5)


def test_digits_are_learnt_in_seconds() -> None:
    workload = load_workload("digits")
    record = train(Trial("digits", preset("soap-f5"), 25, 0), workload, lambda news: None)
    assert record.final < 0.75 * record.train_loss[0]


def test_a_record_is_complete(run) -> None:
    record = run("soap", steps=30)
    assert record.status == "finished"
    assert len(record.train_loss) == len(record.model_seconds) == len(record.optimizer_seconds) == 30
    assert record.validation[-1] == (30, record.final)
    assert len(record.validation) == 12
    assert record.parameters == 44
    assert record.state_bytes > 8 * record.parameters
    assert record.state_bytes < record.peak_memory < 1e5  # the optimizer's, not the process'
    assert Record(**record.as_json()).final == pytest.approx(record.final, rel=1e-5)


def test_a_run_that_blows_up_ends_as_diverged(run) -> None:
    record = run("adamw(lr=1e4, warmup=0.0)", steps=200)
    assert record.status == "diverged"
    assert len(record.model_seconds) < 200
    assert record.final == math.inf
    assert all(map(math.isfinite, record.train_loss))


def test_the_schedule_rises_and_falls() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = Schedule(optimizer, warmup=0.25, length=100)
    rates = []
    for step in range(1, 101):
        schedule.set(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(2 / 25)
    assert max(rates) == rates[24] == 2.0
    assert rates[-1] == pytest.approx(0.02)
    assert rates[24:] == sorted(rates[24:], reverse=True)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_schedule_may_be_all_warm_up_or_none(warmup) -> None:
    schedule = Schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), warmup, length=10)
    assert all(0 < schedule.factor(step) <= 1 for step in range(1, 11))


def test_state_is_counted_in_bytes() -> None:
    model = nn.Linear(10, 10, bias=False)
    optimizer = preset("adamw").optimizer(model)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert meters.state_bytes(optimizer) == pytest.approx(800, abs=16)
