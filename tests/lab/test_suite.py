"""The suite as a whole: on paper, and trained in this process on tiny workloads."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from suites_made_up import STEPS, loss, made_up, record, run_on_paper
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.race.training import train
from steepest.lab.race.trial import Record
from steepest.lab.shared.contenders import preset
from steepest.lab.suite import command, tables
from steepest.lab.suite.log import rows_from_json
from steepest.lab.suite.report import page
from steepest.lab.suite.results import as_json, dumps
from steepest.lab.suite.running import parse_budget
from steepest.lab.suite.text import cell_text, headline, notes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "suite.json"
PAGES = [ROOT / "README.md", ROOT / "docs" / "which-optimizer.md"]
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


# On paper.


def faster(workload, trial):
    """SOAP needs half of the steps on workload one, and three times as many on workload two."""
    speed = 1.0 if trial.contender.label == "adamw" else {"one": 2.0, "two": 1 / 3}[workload]
    return loss(workload, trial, speed=speed)


@pytest.fixture(scope="module")
def finished():
    """A suite of SOAP against AdamW that was run on paper, and its results."""
    suite = made_up("soap-f5")
    run_on_paper(suite, faster)
    return suite, as_json(suite, [], "steepest suite")


def test_steps_and_time_are_shares_of_the_baselines(finished) -> None:
    _, results = finished
    cells = results["cells"]["tuned"]["soap-f5"]
    assert cells["one"]["steps"] == pytest.approx(0.5, rel=1e-3)
    assert (cells["two"]["steps"], cells["two"]["bound"]) == (2.0, "≥")
    assert cells["one"]["step_time"] == pytest.approx((3 + 3) / (3 + 1), rel=1e-5)
    assert cells["one"]["time"] == pytest.approx(0.75, rel=1e-3)
    summary = results["summary"]["tuned"]["soap-f5"]
    assert summary["steps"] == pytest.approx(1.0, rel=1e-3)
    assert (summary["worst"], summary["workloads"], summary["bounded"]) == (2.0, 2, True)
    assert results["summary"]["tuned"]["adamw"]["steps"] == results["summary"]["one_setting"]["adamw"]["time"] == 1.0


def test_the_baseline_is_given_the_same_time_too(finished) -> None:
    _, results = finished
    cell = results["cells"]["tuned"]["soap-f5"]["one"]
    assert cell["baseline_in_same_time"] == pytest.approx(3 - 0.5 * math.log2(1.5) + 0.01, abs=2e-3)
    assert cell["final"] == pytest.approx(3 - 0.5 + 0.01, abs=2e-3)


def test_everybody_gets_the_same_trials(finished) -> None:
    suite, _ = finished
    for task in suite.tasks:
        for contender in suite.contenders:
            tried, further = suite.tuning(task, contender)
            assert len(tried) == 8
            assert not further
            chosen = suite.setting(task, contender, "tuned")
            assert chosen.contender.lr == 2 * preset(contender.label).lr
            losses = suite.finals(task, chosen.contender, "tuned").losses
            assert all(len(seeds) == 3 for seeds in losses.values())
            if contender.label == "adamw":
                assert list(losses) == [0.7, 1.0, 1.4, 2.0]


def test_the_one_setting_is_a_rate_of_the_walk_with_all_else_as_in_the_preset(finished) -> None:
    suite, _ = finished
    choice, missing = suite.choice(suite.contenders[1])
    assert not missing
    start = suite.contenders[1]
    assert choice.lr in (start.lr, 4 * start.lr)  # its optimum is between the two
    assert choice.options | {"lr": 0} == dict(start.options) | {"lr": 0}


def test_the_one_setting_is_best_in_the_mean() -> None:
    """On workload one a rate 16 times as large is best, on two the preset's is, and matters four times as much."""

    def ending(workload, trial):
        rate = math.log2(trial.contender.lr / preset(trial.contender.label).lr)
        apart = 0.1 * (rate - 4) ** 2 if workload == "one" else 0.4 * rate**2
        return 3 - math.log2(trial.steps / STEPS) + apart + 0.01 * trial.seed

    suite = made_up("soap-f5")
    run_on_paper(suite, ending)
    assert [suite.choice(contender)[0].lr for contender in suite.contenders] == [0.01, 0.02]


def test_nothing_is_run_twice_and_the_order_is_by_contender() -> None:
    suite = made_up("soap-f5", "muon")
    ran = run_on_paper(suite)
    assert len({str((w, t.contender.settings(), t.steps, t.seed)) for w, t in ran}) == len(ran)
    labels = [trial.contender.label for _, trial in ran]
    assert labels == sorted(labels, key=["adamw", "soap-f5", "muon"].index)


def test_a_log_goes_on_elsewhere(finished) -> None:
    _, results = finished
    other = made_up("soap-f5")
    for row in rows_from_json(json.loads(dumps(results)), "suite.json"):
        other.log.add(row)
    assert run_on_paper(other, lambda *_: pytest.fail("was run before")) == []
    assert dumps(as_json(other, [], "steepest suite")) == dumps(results)


def test_losses_as_good_as_equal_are_marked() -> None:
    def noisy(workload, trial):
        return loss(workload, trial) + 0.2 * trial.seed

    suite = made_up("soap-f5")
    run_on_paper(suite, noisy)
    results = as_json(suite, [], "")
    assert cell_text(results, "tuned", "soap-f5", "one") == "~1.00"
    assert cell_text(results, "tuned", "adamw", "one") == "1.00"
    assert any(note.startswith("~") for note in notes(results))


def test_diverged_and_failed_runs_count_as_bad() -> None:
    suite = made_up("soap-f5")
    run_on_paper(suite, lambda w, t: math.inf if t.contender.label == "soap-f5" else loss(w, t))
    results = as_json(suite, [], "")
    cell = results["cells"]["tuned"]["soap-f5"]["one"]
    assert (cell["steps"], cell["bound"], cell["final"], cell["significant"]) == (2.0, "≥", None, True)
    assert cell_text(results, "tuned", "soap-f5", "one").startswith("≤0.50")
    assert headline(results).startswith("No optimizer needs fewer steps than adamw")
    assert page(results)


def test_a_baseline_that_diverges_leaves_nothing_to_compare_with() -> None:
    suite = made_up("soap-f5")
    run_on_paper(suite, lambda w, t: math.inf if (w, t.contender.label) == ("one", "adamw") else loss(w, t))
    results = as_json(suite, [], "")
    assert results["cells"]["tuned"]["soap-f5"]["one"]["steps"] is None
    assert results["summary"]["tuned"]["soap-f5"]["workloads"] == 1
    assert page(results)


def test_the_headline_says_that_fewer_steps_take_longer() -> None:
    """A step of ours takes 3 + 3 milliseconds, of the baseline 3 + 1."""
    suite = made_up("soap-f5")
    run_on_paper(suite, lambda w, t: loss(w, t, speed=1.25 if t.contender.label == "soap-f5" else 1.0))
    results = as_json(suite, [], "")
    said = "soap-f5 reaches adamw's final loss 1.25 times as fast in steps and 0.83 times as fast in time"
    assert headline(results).startswith(said)
    assert "Speed-up: adamw&#39;s steps to its final loss, divided by" in page(results)


def test_refused_workloads_are_named_and_not_in_the_mean() -> None:
    suite = made_up("kfac")
    suite.refused = {("kfac", "two"): "needs a likelihood"}
    run_on_paper(suite)
    results = as_json(suite, [], "")
    assert list(results["cells"]["tuned"]["kfac"]) == ["one"]
    assert list(results["summary"]["tuned"]) == ["adamw", "kfac"]  # complete ones come first
    assert "kfac does not train two: needs a likelihood." in notes(results)
    assert cell_text(results, "tuned", "kfac", "two") == "–"


# Pages.


def test_the_leaderboard_has_every_cell_and_loads_nothing(finished) -> None:
    _, results = finished
    html = page(results)
    assert html.count("<svg") == 2 * 2 * 2
    assert "http" not in html
    assert len(html) < 100_000
    assert "1.00 times as fast" not in html


def test_tables_in_pages_are_replaced(finished) -> None:
    _, results = finished
    text = "a\n<!-- suite:begin summary -->\nold\n<!-- suite:end -->\nb\n"
    filled = tables.filled(text, results)
    assert "old" not in filled
    assert "| `soap-f5` | 1.00 | 0.67 | 0.50 | 2 of 2 |" in filled
    assert tables.filled(filled, results) == filled
    both = tables.filled("<!-- suite:begin workloads -->\n<!-- suite:end -->", results)
    assert "| `soap-f5` | 2.00 | ≤0.50 |" in both


@pytest.mark.parametrize(
    "text", ["", "<!-- suite:begin summary -->", "<!-- suite:begin nonsense -->\n<!-- suite:end -->\n"]
)
def test_pages_without_a_place_for_tables_are_refused(finished, text, tmp_path, capsys) -> None:
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "suite.json").write_text(dumps(finished[1]))
    assert tables.main([str(tmp_path / "suite.json"), str(tmp_path / "page.md")]) == 2
    assert "page.md: needs lines '<!-- suite:begin summary -->'" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_of_the_documentation_are_those_of_the_results(path) -> None:
    text = path.read_text(encoding="utf-8")
    if RESULTS.exists():
        assert tables.filled(text, json.loads(RESULTS.read_text(encoding="utf-8"))) == text
    else:
        assert tables.BEGIN not in text


# The command.


class OnPaper:
    """A pool whose runs end as ``run`` says; after ``stop`` of them it is interrupted."""

    ran = 0
    stop = math.inf
    run_one = staticmethod(lambda trial: record(loss("", trial), trial.steps))

    def __init__(self, workers, bars) -> None:
        self.bars = bars

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

    def run(*arguments, stop=math.inf, out="out", optimizers="soap-f5"):
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
    result, ran = suite()
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path / "out")
    assert len(results["trials"]["rows"]) == ran
    assert len(losses_in(results)) == ran
    for column in ("tuned", "one_setting"):
        assert results["summary"][column].keys() == {"adamw", "soap-f5"}
        assert results["summary"][column]["soap-f5"]["workloads"] == 2
        assert 0.25 <= results["summary"][column]["soap-f5"]["steps"] <= 2
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
    result, _ = suite("--budget", f"{1.25 * spent:.1f}s", optimizers="soap-f5, muon, lion")
    assert result.exit_code == 0, result.output
    results = results_in(tmp_path / "out")
    left = [(row["optimizer"], row["column"]) for row in results["left_out"]]
    assert left == [(name, column) for name in ("muon", "lion") for column in ("tuned", "one_setting")]
    assert results["summary"] == results_in(tmp_path / "two")["summary"]
    assert spent_in(results) == spent
    assert "The budget left out: muon (tuned on each workload)" in " ".join(result.output.split())
    more, ran = suite("--budget", f"{1.5 * spent:.1f}s", optimizers="soap-f5, muon, lion")
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
