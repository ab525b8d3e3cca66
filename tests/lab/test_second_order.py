"""Workloads and races for optimizers that use curvature: what they get, what they say where it is missing, and time."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import steepest
from steepest.cli import app
from steepest.lab.race import training
from steepest.lab.race.command import Request
from steepest.lab.race.command import make_plan as make_plan_of
from steepest.lab.race.figures import loss_over_time
from steepest.lab.race.pool import Pool
from steepest.lab.race.race import Plan, Runs
from steepest.lab.race.results import find_results
from steepest.lab.race.stepping import ByGradients, BySampling, stepper
from steepest.lab.race.store import Store
from steepest.lab.race.text import as_json, headline, notes
from steepest.lab.race.training import VALIDATIONS, train
from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.contenders import parse_contenders, preset
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.presets import SECOND_ORDER
from steepest.lab.workloads.workload import load_workload


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a second each time that it is read, so that each half of a step takes one."""
    ticks = itertools.count()
    monkeypatch.setattr(training, "stopwatch", lambda model: ("ticks", lambda: float(next(ticks))))


def run(workload, spec: str, steps: int = 0, seconds: float = 0.0) -> Record:
    return train(Trial("some", parse_contenders(spec)[0], steps, 0, 0.0, seconds), workload, lambda news: None)


@pytest.fixture
def quick(quick_task):
    return load_workload(str(quick_task()))


@pytest.fixture
def autoencoder(loaded):
    return loaded("autoencoder")


@pytest.fixture
def pinn(loaded):
    return loaded("pinn")


def test_the_excess_is_counted_from_a_perfect_copy(autoencoder) -> None:
    class Copy(nn.Module):
        def forward(self, images):
            return torch.logit(images.double(), eps=1e-12)

    assert autoencoder.entropy == pytest.approx(13.675, abs=5e-4)
    assert autoencoder.validation(Copy()) == pytest.approx(0.0, abs=1e-4)
    assert autoencoder.held_out_error(Copy()) == pytest.approx(0.0, abs=1e-10)


def test_an_untrained_autoencoder_guesses(autoencoder) -> None:
    torch.manual_seed(0)
    model = autoencoder.model()
    assert training.validate(model, autoencoder) == pytest.approx(64 * math.log(2) - autoencoder.entropy, abs=1.0)
    assert [module.out_features for module in model if isinstance(module, nn.Linear)] == list(autoencoder.widths[1:])
    assert not isinstance(model[-1], nn.Tanh)


def test_images_that_are_held_out_are_not_trained_on(autoencoder) -> None:
    held_out = {tuple(image) for image in autoencoder.inputs[: autoencoder.held_out].tolist()}
    images, targets = autoencoder.batch(torch.Generator().manual_seed(0))
    assert images.shape == (512, 64)
    assert torch.equal(images, targets)
    assert held_out.isdisjoint(map(tuple, images.tolist()))


@pytest.mark.parametrize("name", ["pinn", "burgers"])
def test_an_equation_has_one_loss_for_everybody(name, loaded) -> None:
    workload = loaded(name)
    torch.manual_seed(0)
    model = workload.model()
    batch = workload.batch(torch.Generator())
    loss = workload.loss(model, batch)
    assert loss.item() == pytest.approx(sum(r.loss(model).item() for r in workload.residuals(batch)), rel=1e-10)
    assert workload.validation(model) == pytest.approx(1.0, abs=0.5)


def test_gauss_newton_gets_the_residuals(pinn) -> None:
    record = run(pinn, "gauss-newton", steps=2)
    assert record.train_loss[1] < record.train_loss[0]
    assert record.own_passes
    torch.manual_seed(0)
    assert record.train_loss[0] == pytest.approx(pinn.loss(pinn.model(), ()).item(), rel=1e-10)


@pytest.mark.parametrize("name", ["lbfgs", "torch.lbfgs", "newton-cg"])
def test_a_closure_has_one_batch_a_step(quick, name) -> None:
    batches = []
    draw = quick.batch
    quick.batch = lambda generator: batches.append(draw(generator)) or batches[-1]
    record = run(quick, name, steps=5)
    assert record.train_loss[-1] < record.train_loss[0]
    assert len(record.train_loss) == len(record.optimizer_seconds) == 5
    assert len(batches) == 5 + 2  # the rehearsal and the meter of memory have one each


@pytest.mark.parametrize(
    "contender", ["newton-cg(products=5)", "newton-cg(curvature='ggn', products=5)", "natural-gradient(products=5)"]
)
def test_closures_return_outputs_where_the_likelihood_is_known(contender) -> None:
    record = run(load_workload("digits"), contender, steps=3)
    assert record.train_loss[-1] < record.train_loss[0]
    assert record.own_passes


def test_a_schedule_leaves_optimizers_alone_that_choose_lengths(quick, monkeypatch) -> None:
    rates = []
    monkeypatch.setattr(training, "state_bytes", lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]) or 1)
    run(quick, "torch.lbfgs", steps=3)
    run(quick, "adamw(lr=1e-2)", steps=3)
    assert rates[::2] == [1.0, 1e-2]  # what the meter of memory sees, before its step
    assert rates[1::2] == [1.0, pytest.approx(1e-4)]


class Listening(torch.optim.SGD):
    """Counts what K-FAC would be told."""

    fisher = "sampled"

    def __init__(self, params) -> None:
        super().__init__(params, lr=0.1)
        self.heard: list[tuple[torch.Size, str, bool]] = []

    def sample(self, outputs, likelihood) -> None:
        self.heard.append((outputs.shape, likelihood, self.param_groups[0]["params"][0].grad is None))


def test_targets_are_sampled_between_forward_and_backward() -> None:
    digits = load_workload("digits")
    model = digits.model()
    optimizer = Listening(model.parameters())
    way = BySampling(model, optimizer, digits, torch.Generator().manual_seed(0))
    loss = way.prepare()
    assert optimizer.heard == [((128, 10), "categorical", True)]
    assert way.step() == loss
    training.validate(model, digits)
    assert len(optimizer.heard) == 1


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_sampled_fisher_needs_a_likelihood(quick, name) -> None:
    model = quick.model()
    with pytest.raises(BadInput, match="`likelihood`"):
        stepper(model, preset(name).optimizer(model), quick, torch.Generator())


def test_an_empirical_fisher_needs_none(quick) -> None:
    model = quick.model()
    optimizer = preset("kfac").varied(fisher="empirical").optimizer(model)
    assert type(stepper(model, optimizer, quick, torch.Generator())) is BySampling


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kfac(fisher='empirical')"])
def test_kfac_trains_on_its_own_samples(autoencoder, name) -> None:
    record = run(autoencoder, name, steps=20)
    assert record.status == "finished"
    assert record.final < 30.7 - 3  # it begins at 30.7
    assert record.own_passes


def test_other_optimizers_step_along_gradients(quick) -> None:
    model = quick.model()
    assert type(stepper(model, torch.optim.SGD(model.parameters()), quick, torch.Generator())) is ByGradients


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--workload", "digits", "--optimizers", "gauss-newton"], "optimizer gauss-newton: it needs residuals"),
        (["--workload", "pinn", "--optimizers", "gauss-newton(lr=1.0)"], "optimizer gauss-newton(lr=1.0): "),
        (
            ["--workload", "pinn", "--optimizers", "newton-cg(curvature='ggn')"],
            "optimizer newton-cg(curvature='ggn'): ",
        ),
        (["--workload", "autoencoder", "--optimizers", "natural-gradient"], "that of the workload is 'bernoulli'"),
        (["--workload", "digits", "--optimizers", "torch.lbfgs", "--poison", "0.1"], "can't reach gradients"),
        (["--workload", "digits", "--seconds", "3", "--steps", "3"], "--seconds and --steps"),
        (["--workload", "digits", "--seconds", "3", "--full"], "--seconds and --full"),
    ],
)
def test_what_cannot_be_raced_is_said_in_one_line(tmp_path, options, complaint) -> None:
    done = CliRunner().invoke(app, ["race", "--out", str(tmp_path), *options])
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_preset_of_second_order_is_swept_unasked() -> None:
    for name in SECOND_ORDER:
        assert preset(name).warmup == 0.0
        assert preset(name).provenance


# Races over time.


def test_a_trial_ends_when_its_time_is_used(quick, ticking) -> None:
    record = run(quick, "adamw", seconds=24)
    assert record.model_seconds == record.optimizer_seconds == [1.0] * 12
    assert [step for step, _ in record.validation] == list(range(1, 13))


def test_the_rate_follows_the_time(quick, ticking, monkeypatch) -> None:
    ends = []
    factor = training.Schedule.factor
    monkeypatch.setattr(training.Schedule, "factor", lambda self, end: ends.append(end) or factor(self, end))
    run(quick, "adamw", seconds=7)
    assert ends == [0.007, 4.0, 6.0, 7.0]


def test_a_long_step_passes_several_marks(quick, ticking) -> None:
    record = run(quick, "adamw", seconds=3)
    assert [step for step, _ in record.validation] == [1] * 8 + [2] * 4
    assert len(record.validation) == VALIDATIONS


def made_up(plan: Plan, make_record) -> Runs:
    """Runs over 10 s: adamw takes 100 steps and soap 40, down to 2 and to 1 from 3 above."""
    runs = Runs(plan)
    for trial in plan.tuning():
        steps = 100 if trial.contender.label == "adamw" else 40
        record = make_record(2.0 if steps == 100 else 1.0, steps)
        record.model_seconds, record.optimizer_seconds = [0.05] * steps, [10 / steps - 0.05] * steps
        runs.finished.append(Run(trial, record))
    return runs


def test_time_to_the_target_is_compared_where_steps_differ(make_plan, make_record) -> None:
    plan = make_plan("adamw", "soap", steps=0)
    plan = Plan(plan.workload, plan.entries, 0, 2, seconds=10.0)
    assert sum(plan.distances) == 40
    found = find_results(made_up(plan, make_record))
    soap, adamw = found.entries
    assert adamw.steps_to_target.steps == 100
    assert soap.steps_to_target.steps == pytest.approx(40 * 2 / 3)
    assert soap.time_share == pytest.approx(2 / 3)
    claim, losses = headline(found)
    assert "at most 67% of adamw's CPU time" in claim
    assert losses.startswith("After 10 s, adamw ends at a loss of 2.000")
    assert any("10 s of CPU time" in note for note in notes(found))
    assert as_json(found)["seconds"] == 10.0


def test_passes_of_its_own_count_for_an_optimizer(make_plan, make_record) -> None:
    plan = make_plan("adamw", "soap", seeds=1)
    runs = Runs(plan)
    for trial in plan.tuning():
        record = make_record(2.0 if trial.contender.label == "adamw" else 1.0)
        if trial.contender.label == "soap":
            record.own_passes, record.model_seconds = True, [0.001] * 10
        runs.finished.append(Run(trial, record))
    soap, adamw = find_results(runs).entries
    assert (adamw.model_ms, soap.model_ms) == (pytest.approx(10.0), pytest.approx(1.0))
    assert soap.time_share == pytest.approx(soap.steps_share * 2 / 11)


def test_trials_over_time_are_kept_apart(make_plan, tmp_path) -> None:
    store = Store(tmp_path, "fingerprint")
    trials = [Trial("digits", preset("adamw"), 0, 0, 0.0, seconds) for seconds in (1.0, 2.0)]
    assert len({store.identity(trial)["seconds"] for trial in trials}) == 2
    assert "-2s-" in store.path(trials[1]).name
    assert str(trials[0]) == "adamw lr 0.01, 1 s, seed 0"


def test_a_race_over_time_has_a_report(tmp_path, monkeypatch, ticking) -> None:
    def at_once(pool, trials, ended):
        for trial in trials:
            ended(trial, train(trial, load_workload(trial.workload), lambda news: told.append(news)))

    told: list[dict] = []
    monkeypatch.setattr(Pool, "run", at_once)
    options = ["--workload", "pinn", "--optimizers", "gauss-newton", "--seconds", "3", "--seeds", "1"]
    done = CliRunner().invoke(app, ["race", "--out", str(tmp_path), "--workers", "1", *options])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["contender"] for row in found["contenders"]] == ["gauss-newton"]
    assert found["contenders"][0]["settings"]["options"] == {}
    page = (tmp_path / "report.html").read_text()
    assert ">3 s<" in page
    assert [news["done"] for news in told] == [2.0, 4.0]
    assert set(told[0]) == {"done", "train", "validation"}
    assert steepest.__version__ in page


def test_losses_over_decades_have_a_logarithmic_axis(make_plan, make_runs) -> None:
    finals = {"adamw": 1e-2, "soap": 1e-6}
    found = find_results(make_runs(make_plan("adamw", "soap"), lambda trial: finals[trial.contender.label]))
    axis = loss_over_time(found).layout.yaxis
    assert axis.type == "log"
    assert -7 < axis.range[0] < -6 < axis.range[1] < 1
    near = find_results(make_runs(make_plan("adamw", "soap"), lambda trial: 1.0))
    assert loss_over_time(near).layout.yaxis.type != "log"


def test_a_rate_is_swept_where_there_is_one() -> None:
    request = Request("lbfgs, gauss-newton", "pinn", False, ["lr=0.5, 1.0"], None, 1.0, 1, 0.0, 1, Path("runs"), "")
    lbfgs, gauss_newton = make_plan_of(request, load_workload("pinn")).entries
    assert [candidate.lr for candidate in lbfgs.candidates] == [0.5, 1.0]
    assert [candidate.rate for candidate in gauss_newton.candidates] == ["–"]
