"""The command ``steepest suite`` on tiny workloads: on paper, and trained in this process."""

from __future__ import annotations

import json
import math
import os

import pytest
from suites_made_up import loss, record
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.race.pool import Pool
from steepest.lab.race.training import train
from steepest.lab.race.trial import Record
from steepest.lab.suite import command, protocol
from steepest.lab.suite.running import parse_budget

TINY = """
import torch
from torch import nn
from steepest.lab import Workload

class Tiny(Workload):
    steps = {steps}

    def model(self):
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def batch(self, generator):
        return torch.randn(8, 3, generator=generator)

    def loss(self, model, batch):
        return (model(batch) - batch[:, :1]).square().mean()

    def validation(self, model):
        return self.loss(model, torch.linspace(-1, 1, 9).reshape(3, 3)).item()
"""


class OnPaper(Pool):
    """A pool whose runs end as ``run`` says; after ``stop`` of them it is interrupted."""

    ran = 0
    stop = math.inf
    run_one = staticmethod(lambda trial: record(loss("", trial), trial.steps))

    def run(self, trials, ended) -> None:
        for trial in trials:
            if OnPaper.ran >= OnPaper.stop:
                raise KeyboardInterrupt
            OnPaper.ran += 1
            self.bars.started(trial)
            ended(trial, Record(**self.run_one(trial).as_json()))  # rounded, as processes send it


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs ``steepest suite`` on two tiny workloads in a folder, and returns its result and how many runs it took."""
    monkeypatch.setattr(command, "Pool", OnPaper)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # tests/lab/test_faults.py has disks that fail
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for steps, file in zip((4, 6), files, strict=True):
        file.write_text(TINY.format(steps=steps))

    def run(*arguments, stop=math.inf, out="out", optimizers="soap-f5", files=files):
        OnPaper.ran, OnPaper.stop = 0, stop
        workloads = ",".join(map(str, files))
        fixed = ["--optimizers", optimizers, "--workloads", workloads, "--out", str(tmp_path / out)]
        result = CliRunner().invoke(app, ["suite", *fixed, *arguments])
        return result, OnPaper.ran

    return run


def results_in(folder):
    return json.loads((folder / "suite.json").read_text())


def losses_in(results):
    """Workload, optimizer, setting, steps, seed and loss of each run."""
    return [row[:6] for row in results["trials"]["rows"]]


def spent_in(results):
    """The CPU seconds of all runs."""
    place = results["trials"]["columns"].index("cpu_seconds")
    return sum(row[place] for row in results["trials"]["rows"])


def test_a_tiny_suite_is_trained(suite, tmp_path, loaded, monkeypatch) -> None:
    def trained(trial):
        return train(trial, loaded(trial.workload), lambda message: None)

    monkeypatch.setattr(OnPaper, "run_one", staticmethod(trained))
    result, ran = suite(files=[tmp_path / "a.py"])
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path / "out")
    assert len(results["trials"]["rows"]) == ran
    assert len(losses_in(results)) == ran
    for column in ("tuned", "one_setting"):
        assert results["summary"][column].keys() == {"adamw", "soap-f5"}
        assert results["summary"][column]["soap-f5"]["workloads"] == 1
        assert protocol.LADDER[0] <= results["summary"][column]["soap-f5"]["steps"] <= 2
        assert results["summary"][column]["soap-f5"]["time"] > 0
    assert "Tuned on each workload" in result.output
    assert "<svg" in (tmp_path / "out" / "suite.html").read_text()


def test_a_suite_that_is_killed_goes_on_and_ends_the_same(suite, tmp_path) -> None:
    whole, count = suite(out="whole")
    assert whole.exit_code == 0, whole.output
    total = 0
    for stop in (5, count // 2, 10**6):
        result, ran = suite(stop=stop)
        total += ran
        assert result.exit_code == (0 if stop == 10**6 else 130)
        assert ("the same command continues" in result.output) == (result.exit_code == 130)
        assert results_in(tmp_path / "out")["trials"]["rows"]
    assert total == count
    assert suite()[1] == 0
    assert losses_in(results_in(tmp_path / "out")) == losses_in(results_in(tmp_path / "whole"))


def test_a_suite_goes_on_from_results(suite, tmp_path) -> None:
    _, count = suite(out="whole")
    file = str(tmp_path / "whole" / "suite.json")
    elsewhere, ran = suite("--from", file, out="elsewhere")
    assert (elsewhere.exit_code, ran) == (0, 0)
    assert results_in(tmp_path / "elsewhere")["cells"] == results_in(tmp_path / "whole")["cells"]
    # A workload that has changed since is run again, the other one is not.
    (tmp_path / "b.py").write_text(TINY.format(steps=6).replace("nn.Tanh", "nn.ReLU"))
    changed, ran = suite("--from", file, out="changed")
    assert changed.exit_code == 0
    assert ran == sum(row[0] == "b" for row in results_in(tmp_path / "changed")["trials"]["rows"])
    assert 0 < ran < count


def test_a_budget_drops_contenders_from_the_end_and_says_so(suite, tmp_path) -> None:
    """What is left suffices for muon's one setting, but not for its tuning, which comes before."""
    suite(out="two")
    assert results_in(tmp_path / "two")["left_out"] == []
    spent = spent_in(results_in(tmp_path / "two"))
    result, _ = suite("--budget", f"{1.35 * spent:.1f}s", optimizers="soap-f5, muon, lion")
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path / "out")
    left = [(row["optimizer"], row["column"]) for row in results["left_out"]]
    assert left == [(name, column) for name in ("muon", "lion") for column in ("tuned", "one_setting")]
    assert results["summary"] == results_in(tmp_path / "two")["summary"]
    assert spent_in(results) == spent
    assert "The budget left out: muon (tuned on each workload)" in " ".join(result.output.split())
    more, ran = suite("--budget", f"{1.6 * spent:.1f}s", optimizers="soap-f5, muon, lion")
    assert more.exit_code == 0
    assert ran > 0
    assert results_in(tmp_path / "out")["summary"]["tuned"].keys() == {"adamw", "soap-f5", "muon"}


def test_the_baseline_is_never_left_out(suite, tmp_path) -> None:
    result, _ = suite("--budget", "1s")
    assert result.exit_code == 0
    assert results_in(tmp_path / "out")["summary"]["one_setting"].keys() == {"adamw"}


def test_runs_that_fail_are_named_and_count_as_diverged(suite, tmp_path, monkeypatch) -> None:
    class Failing(OnPaper):
        def run(self, trials, ended) -> None:
            for trial in trials:
                ended(trial, "it broke" if trial.contender.lr > 0.02 else record(loss("", trial), trial.steps))

    monkeypatch.setattr(command, "Pool", Failing)
    result, _ = suite()
    assert result.exit_code == 1
    failures = results_in(tmp_path / "out")["failures"]
    assert {row["reason"] for row in failures} == {"it broke"}
    assert "failed and counts as diverged" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--optimizers", "sopa"], "did you mean 'soap'"),
        (["--workloads", "nowhere"], "unknown workload 'nowhere'"),
        (["--workloads", "digits, digits"], "workload digits is named twice"),
        (["--workloads", ","], "no workload is named"),
        (["--budget", "10"], "--budget 10: write CPU time as 90s, 10m or 2h"),
        (["--budget", "0m"], "write CPU time as 90s, 10m or 2h"),
        (["--from", "nowhere.json"], "--from nowhere.json"),
        (["--from", __file__], "--from"),
        (["--optimizers", "newton-cg", "--workloads", "digits"], "has no learning rate to tune"),
        (["--optimizers", "lbfgs", "--workloads", "digits"], "evaluates the loss itself"),
        (["--optimizers", "soap(nonsense=1)", "--workloads", "digits"], "nonsense"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, complaint, tmp_path) -> None:
    rest = [] if "--workloads" in arguments else ["--workloads", "digits"]
    result = CliRunner().invoke(app, ["suite", *arguments, *rest, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert complaint in result.output
    assert result.output.count("\n") == 1


def test_other_results_are_refused(tmp_path) -> None:
    (tmp_path / "race.json").write_text('{"contenders": []}')
    options = ["--workloads", "digits", "--from", str(tmp_path / "race.json"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["suite", *options])
    assert result.exit_code == 2
    assert "holds no results of steepest suite" in result.output


def test_budgets() -> None:
    assert parse_budget("1.5h") == 5400
