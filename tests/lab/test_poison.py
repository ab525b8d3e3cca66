"""Poisoned races: our optimizers skip updates with NaN or infinite gradients, and end as without poison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import pytest
import torch
from short_training import Here
from torch import nn
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.race import command
from steepest.lab.race.poison import KINDS, MOST, Poison
from steepest.lab.race.results import find_results
from steepest.lab.race.text import headline, notes
from steepest.lab.race.training import train
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import Contender, parse_contenders, preset
from steepest.lab.shared.presets import PRESETS
from steepest.lab.workloads.workload import Workload, load_workload


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(quick_task: Callable[[], Path]) -> Workload:
    return load_workload(str(quick_task()))


def run(contender: Contender, workload: Workload, poison: float, steps: int = 40, seed: int = 0) -> Record:
    return train(Trial("quick", contender, steps, seed, poison), workload, lambda progress: None)


# Gradients.


def parameters(count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.zeros(3, 4)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(3, 4)
    return params


def bad(p: nn.Parameter) -> list[float]:
    assert p.grad is not None
    return p.grad[~p.grad.isfinite()].tolist()


def test_so_many_gradients_are_struck() -> None:
    params = parameters(4000)
    count = Poison(0.1, seed=0).apply(params)
    struck = [p for p in params if bad(p)]
    assert len(struck) == count
    assert count == pytest.approx(400, abs=80)
    assert all(1 <= len(bad(p)) <= MOST for p in struck)
    assert {len(bad(p)) for p in struck} >= {1, 4}
    assert len({i for p in struck for i in (~p.grad.isfinite()).view(-1).nonzero().view(-1).tolist()}) == 12


def test_kinds_take_turns() -> None:
    params = parameters(7)
    poison = Poison(1.0, seed=0)
    assert poison.apply(params[:4]) + poison.apply(params[4:]) == 7
    kinds = [kind for p in params for kind in {str(x) for x in bad(p)}]
    assert kinds == [str(KINDS[i % 3]) for i in range(7)]


def test_poison_comes_from_the_seed_alone() -> None:
    def struck(seed: int) -> list[bool]:
        params = parameters(100)
        Poison(0.3, seed).apply(params)
        return [bool(bad(p)) for p in params]

    torch.manual_seed(0)
    first = struck(0)
    assert first == struck(0) != struck(1)
    state = torch.get_rng_state()
    struck(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_without_a_gradient_are_passed_over() -> None:
    params = [*parameters(1), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0, 3))]
    params[2].grad = torch.zeros(0, 3)
    assert Poison(1.0, seed=0).apply(params) == 1
    assert Poison(0.0, seed=0).apply(parameters(1)) == 0


# Contenders.


@pytest.mark.parametrize("name", PRESETS)
def test_every_contender_leaves_poisoned_updates_out(name: str, quick: Workload) -> None:
    clean, poisoned = run(preset(name), quick, 0.0), run(preset(name), quick, 0.05)
    assert poisoned.train_loss[0] == clean.train_loss[0]
    assert poisoned.train_loss != clean.train_loss
    assert (clean.poisoned, clean.skipped) == (0, 0)
    assert poisoned.status == "finished"
    assert poisoned.skipped == poisoned.poisoned > 2
    assert poisoned.final < poisoned.train_loss[0]


def test_poison_changes_neither_weights_nor_batches(quick: Workload) -> None:
    """With a rate too small to learn anything, all losses are the same."""
    (still,) = parse_contenders("adamw(lr=1e-12)")
    clean, poisoned = run(still, quick, 0.0), run(still, quick, 0.1)
    assert poisoned.poisoned > 5
    assert poisoned.train_loss == pytest.approx(clean.train_loss, rel=1e-5)


class Torchs(Contender):
    """A contender that trains with torch.optim.AdamW."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr)


@pytest.mark.parametrize(("poison", "steps"), [(0.02, 60), (0.5, 8)])
def test_who_takes_the_step_diverges(poison: float, steps: int, quick: Workload) -> None:
    """The run is recorded as diverged, also with measurements of its weights in each of eight steps."""
    ours = preset("adamw")
    torchs = Torchs("torch", ours.rule, ours.options, None, ours.warmup)
    assert run(torchs, quick, 0.0).status == "finished"
    for seed in range(3):
        record = run(torchs, quick, poison, steps, seed)
        assert record.status == "diverged"
        assert record.final == math.inf
        assert record.poisoned >= 1
        assert record.skipped is None


# Output.


def test_the_race_says_what_it_did(
    quick_task: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Pool", Here)
    arguments = ["race", "--workload", str(quick_task()), "--optimizers", "soap", "--steps", "30", "--seeds", "1"]
    clean = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    done = CliRunner().invoke(app, [*arguments, "--poison", "0.1", "--out", str(tmp_path)])
    assert (clean.exit_code, done.exit_code) == (0, 0), done.output
    assert "10% of gradients poisoned" in done.output
    assert "poison" not in clean.output
    assert len(list((tmp_path / "runs").iterdir())) == 2, "clean runs don't stand for poisoned ones"
    found = json.loads((tmp_path / "results.json").read_text())
    (soap,) = found["contenders"]
    assert found["poison"] == 0.1
    assert soap["updates_skipped"] == soap["gradients_poisoned"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "10% of gradients poisoned" in page
    assert (
        f"left out, of the gradients poisoned: soap {soap['updates_skipped']} of {soap['gradients_poisoned']}." in page
    )


def test_who_does_not_count_is_said_not_to(make_plan, make_runs) -> None:
    plan = make_plan("adamw", "soap")
    runs = make_runs(type(plan)(plan.workload, plan.entries, plan.steps, plan.seeds, poison=0.02), lambda t: 1.0)
    for done in runs.finished:
        done.record.poisoned = 3
        done.record.skipped = 3 if done.trial.contender.label == "soap" else None
    found = find_results(runs)
    assert "with 2% of gradients poisoned" in headline(found)[1]
    assert "adamw uncounted of 6, soap 6 of 6." in notes(found)[0]


@pytest.mark.parametrize("share", ["-0.1", "1.5", "much"])
def test_a_share_out_of_range_is_refused(share: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["race", "--poison", share, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "--poison" in done.output


# The claim.


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["soap", "soap-f5", "kl-soap", "muon", "adamw"])
def test_losses_end_where_they_would(name: str) -> None:
    """300 steps on `stdlib` with 1% of gradients poisoned end within 0.02 of the clean race, at the same seeds.

    Single seeds differ by up to about as much: a run that takes another way ends elsewhere, poisoned or not.
    """
    workload = load_workload("stdlib")
    seeds = range(2)
    clean, poisoned = ([run(preset(name), workload, share, 300, seed) for seed in seeds] for share in (0.0, 0.01))
    assert all(record.skipped == record.poisoned > 30 for record in poisoned)
    assert abs(fmean(r.final for r in poisoned) - fmean(r.final for r in clean)) < 0.02
