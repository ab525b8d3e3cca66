"""``steepest tune``: what it tries, prints and saves, with runs on paper, and trained in this process."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from suites_made_up import record
from torch import nn
from typer.testing import CliRunner

import steepest
from steepest.cli import app
from steepest.lab.race.pool import Pool
from steepest.lab.race.training import train
from steepest.lab.race.trial import Record
from steepest.lab.shared.contenders import preset
from steepest.lab.tune import command, text


def bowl(trial, lr=0.04, others=0.04):
    """A loss that is lowest at these rates, and at a weight decay of 0."""
    setting = trial.contender
    rate = (setting.elementwise or {}).get("lr", others)
    return (
        1
        + 0.1 * math.log2(setting.lr / lr) ** 2
        + 0.1 * math.log2(rate / others) ** 2
        + setting.options.get("weight_decay", 0)
    )


class OnPaper(Pool):
    """A pool whose runs end as ``ending`` says: at a loss, or as a reason for failure. After ``stop`` comes Ctrl-C."""

    ending = staticmethod(bowl)
    stop = math.inf
    ran: list = []  # noqa: RUF012

    def run(self, trials, ended) -> None:
        for trial in trials:
            if len(OnPaper.ran) >= OnPaper.stop:
                raise KeyboardInterrupt
            OnPaper.ran.append(trial)
            self.bars.started(trial)
            outcome = OnPaper.ending(trial)
            if isinstance(outcome, float):
                outcome = record(outcome, trial.steps)  # of a tenth of a CPU second for each step
            ended(trial, outcome if isinstance(outcome, str) else Record(**outcome.as_json()))


@pytest.fixture
def tune(quick_task, tmp_path, monkeypatch):
    """Runs ``steepest tune`` on a tiny task, and returns what it printed, how often it trained, and its JSON file."""
    monkeypatch.setattr(command, "Pool", OnPaper)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # tests/lab/test_faults.py has disks that fail
    task = str(quick_task())

    def run(*arguments, ending=bowl, stop=math.inf, out="out", status=0):
        OnPaper.ending, OnPaper.stop, OnPaper.ran = staticmethod(ending), stop, []
        fixed = ["tune", task, "--out", str(tmp_path / out)]
        done = CliRunner().invoke(app, [*fixed, *map(str, arguments)], env={"COLUMNS": "80"})
        assert done.exit_code == status, done.output
        file = tmp_path / out / "tune.json"
        return done, len(OnPaper.ran), json.loads(file.read_text()) if file.exists() else None

    return run


def optimizer_of(code, model):
    """The optimizer that the printed code makes."""
    names = {"model": model}
    exec(code, names)
    return names["optimizer"]


def plain(groups):
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


def test_the_best_setting_is_found_saved_and_printed_as_code(tune, tmp_path) -> None:
    done, ran, found = tune()
    assert ran == len(found["trials"]) == 8
    best = found["best"]
    assert (best["options"]["lr"], best["elementwise"]["lr"], best["options"]["weight_decay"]) == (0.04, 0.04, 0.0)
    assert best["loss"] == min(trial["loss"] for trial in found["trials"]) == 1.0
    assert (best["edges"], found["complete"]) == ([], True)
    assert best["code"] in done.output
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    made = optimizer_of(best["code"], model)
    again = steepest.for_model(model, best["rule"], elementwise=best["elementwise"], **best["options"])
    assert plain(made.param_groups) == plain(again.param_groups)
    assert {group["lr"] for group in made.param_groups} == {0.04}
    lines = done.output.splitlines()
    assert max(map(len, lines[:-1])) <= 80  # the last one has the path
    assert "8 best" in done.output
    assert "*" not in done.output
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("plotly-graph-div") == 1
    assert "http" not in html.split("<body>")[-1].split("<script")[0]  # nothing is loaded
    for label in ("all rates together", "lr 0.04, weight_decay 0.0", "steepest.for_model("):
        assert label in html


def test_it_trains(tune, loaded, tmp_path) -> None:
    def trained(trial):
        return train(trial, loaded(trial.workload), lambda message: None)

    _, ran, found = tune("--steps", 3, "--trials", 4, ending=trained)
    assert (ran, found["steps"]) == (4, 3)
    assert found["best"]["loss"] == min(trial["loss"] for trial in found["trials"])
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4


def test_a_search_that_is_stopped_goes_on_and_ends_the_same(tune) -> None:
    whole = tune(out="whole")[2]
    done, ran, found = tune(stop=3, status=130)
    assert (ran, len(found["trials"]), found["complete"]) == (3, 3, False)
    assert "Interrupted: the same command continues." in done.output
    assert found["best"]["code"] in done.output
    done, ran, found = tune()
    assert ran == 5
    assert found | {"command": ""} == whole | {"command": ""}
    assert tune()[1] == 0
    done, ran, found = tune(stop=0, status=130, out="none")
    assert (ran, found) == (0, None)


def test_a_budget_ends_the_search_and_a_larger_one_goes_on(tune) -> None:
    """A run takes 0.4 seconds: four fit into 1.7, and those of an earlier call count."""
    done, ran, found = tune("--budget", "1.7s")
    assert (ran, found["complete"]) == (4, False)
    assert "The budget ended the search after 4 of up to 8 settings: a larger one goes on." in flat(done)
    assert tune("--budget", "1.7s")[1] == 0
    done, ran, found = tune("--budget", "1h")
    assert (ran, found["complete"]) == (4, True)
    assert "The budget" not in done.output
    assert tune("--budget", "0.1s", out="small")[1] == 1  # the first one always runs


def flat(done):
    return " ".join(done.output.split())


def test_an_edge_is_marked_and_more_trials_go_on_beyond(tune) -> None:
    def far(trial):
        return 1 + 0.1 * math.log2(trial.contender.lr / 80) ** 2

    done, ran, found = tune(ending=far)
    assert (ran, found["best"]["edges"]) == (8, ["lr"])
    assert f"{found['best']['options']['lr']:g}*" in done.output
    assert sum("*" in line for line in done.output.splitlines()) == 2  # in the row of the best, and in the note
    assert "* the best learning rate is the lowest or highest that was tried: --trials 12 goes on beyond." in flat(done)
    done, ran, found = tune("--trials", 12, ending=far)
    assert 0 < ran < 12
    assert found["best"]["options"]["lr"] == pytest.approx(80, rel=0.5)
    assert found["best"]["edges"] == []
    done, _, found = tune("--trials", 3, ending=lambda trial: bowl(trial, lr=1.0), out="few")
    assert found["best"]["edges"] == ["lr"]


def test_an_edge_of_the_other_rate_names_the_way_on(tune) -> None:
    def apart(trial):
        return bowl(trial, lr=0.02, others=2.0)

    done, _, found = tune("--optimizer", "soap-f5(betas=(0.9, 0.95))", ending=apart)
    assert found["best"]["edges"] == ["elementwise"]
    lr, others = found["best"]["options"]["lr"], found["best"]["elementwise"]["lr"]
    assert f"{others:g}*" in done.output
    spec = f"soap-f5(betas=(0.9, 0.95), lr={lr}, elementwise={{'lr': {others}}})"
    assert f'--optimizer "{spec}"' in flat(done)
    _, _, found = tune("--optimizer", spec, ending=apart, out="on")
    assert found["trials"][0]["settings"]["options"]["precondition_frequency"] == 5
    assert found["trials"][0]["settings"]["elementwise"]["lr"] == others


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "kl-soap-f4", "lion", "soap/paper"])
def test_every_table_fits_and_every_code_makes_what_was_tried(name, tune) -> None:
    done, _, found = tune("--optimizer", name)
    assert max(map(len, done.output.splitlines()[:-1])) <= 80
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    made = optimizer_of(found["best"]["code"], model)
    if name != "sgd":
        again = steepest.for_model(
            model,
            found["best"]["rule"],
            elementwise=None if name in ("adamw", "lion") else found["best"]["elementwise"],
            **found["best"]["options"],
        )
        assert plain(made.param_groups) == plain(again.param_groups)
    else:
        assert isinstance(made, torch.optim.SGD)
        assert made.param_groups[0]["lr"] == found["best"]["options"]["lr"]


def test_what_else_was_changed_has_a_column(tune) -> None:
    done, _, _ = tune("--optimizer", "adamw")
    assert "betas=(0.9, 0.95)" in done.output
    assert "other parameters" not in flat(done)
    assert " changed " in done.output
    assert " changed " not in tune("--optimizer", "soap", out="soap")[0].output


def test_where_nothing_trains_there_is_no_setting(tune, tmp_path) -> None:
    done, ran, found = tune(ending=lambda trial: math.inf, status=1)
    assert (ran, found["best"]) == (8, None)
    assert "None of 8 settings trained: start lower, --optimizer" in flat(done)
    assert "for_model" not in done.output
    assert "diverged" in done.output
    assert (tmp_path / "out" / "report.html").exists()


def test_failures(tune) -> None:
    """The first run's is an error of the task, as likely as not; later ones count as diverged."""
    done, ran, found = tune(ending=lambda trial: "it broke", status=2)
    assert (ran, found) == (1, None)
    assert done.stderr == "steepest: soap lr 0.02, 4 steps, seed 0: it broke\n"

    def later(trial):
        return "it broke" if trial.contender.lr > 0.05 else bowl(trial)

    done, ran, found = tune(ending=later, status=1)
    assert ran == 8
    assert done.output.count("failed") >= 2
    assert found["best"]["loss"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "unknown workload 'nowhere'"),
        (["digits", "--optimizer", "sopa"], "did you mean 'soap'"),
        (["digits", "--optimizer", "soap, muon"], "--optimizer soap, muon: give one; steepest race compares several"),
        (["digits", "--optimizer", "lbfgs"], "it chooses the lengths of its steps, so there is no rate to tune"),
        (["digits", "--optimizer", "newton-cg"], "it chooses the lengths of its steps"),
        (["digits", "--budget", "10"], "--budget 10: write CPU time as 90s, 10m or 2h"),
        (["digits", "--optimizer", "soap(nonsense=1)"], "nonsense"),
        (["digits", "--out", __file__], "can't write to"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(arguments, complaint, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["tune", *arguments])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_code_is_folded_between_arguments() -> None:
    code = text.code(preset("kl-soap-f4"))
    assert max(map(len, code.splitlines())) <= 80
    compile(code, "code", "exec")
