"""What comes out of a suite that was run on paper: its cells, means and one setting, its leaderboard and tables."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from suites_made_up import STEPS, loss, made_up, run_on_paper

from steepest.lab.shared.contenders import preset
from steepest.lab.suite import tables
from steepest.lab.suite.command import fits
from steepest.lab.suite.log import rows_from_json
from steepest.lab.suite.report import page
from steepest.lab.suite.results import as_json, dumps
from steepest.lab.suite.text import by_workload, cell_text, headline, notes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "suite.json"
PAGES = [ROOT / "README.md", ROOT / "docs" / "which-optimizer.md"]


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


def test_the_one_setting_is_a_rate_that_was_tried_with_all_else_as_in_the_preset(finished) -> None:
    suite, _ = finished
    choice, missing = suite.choice(suite.contenders[1])
    assert not missing
    start = suite.contenders[1]
    assert choice.lr == 2 * start.lr
    assert choice.options | {"lr": 0} == dict(start.options) | {"lr": 0}


def test_the_one_setting_is_best_in_the_mean() -> None:
    """On workload one a rate 16 times as large is best, on two the preset's is, and matters four times as much.

    So 2**0.8 times the preset's would be best, and twice it is nearest.
    """

    def ending(workload, trial):
        rate = math.log2(trial.contender.lr / preset(trial.contender.label).lr)
        apart = 0.1 * (rate - 4) ** 2 if workload == "one" else 0.4 * rate**2
        return 3 - math.log2(trial.steps / STEPS) + apart + 0.01 * trial.seed

    suite = made_up("soap-f5")
    run_on_paper(suite, ending)
    assert [suite.choice(contender)[0].lr for contender in suite.contenders] == [0.02, 0.04]


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


def test_times_come_from_one_machine_if_any_ran_both() -> None:
    suite = made_up("soap-f5")
    run_on_paper(suite)
    contender, task = suite.contenders[1], suite.tasks[0]
    here = suite.cell(task, contender, "tuned").step_time
    assert here == pytest.approx((3 + 3) / (3 + 1))

    def moved(optimizer: str, seeds: tuple[int, ...], machine: str, milliseconds: float) -> float:
        for row in list(suite.log):
            if row.optimizer == optimizer and row.seed in seeds:
                suite.log.add(replace(row, machine=machine, optimizer_ms=milliseconds))
        return suite.cell(task, contender, "tuned").step_time

    assert moved("adamw", (1, 2), "another", 3.0) == here  # SOAP has no runs there
    assert moved("soap-f5", (1,), "another", 5.0) == here  # and now fewer than here
    assert moved("soap-f5", (0, 2), "a third", 7.0) == pytest.approx((3 + 5) / (3 + 3))
    assert moved("soap-f5", (0, 1, 2), "a third", 3.0) == pytest.approx((3 + 3) / (3 + 3))  # none in common


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


def test_the_leaderboard_sorts_by_what_it_shows() -> None:
    """Its script puts empty values last, whichever way it sorts."""
    suite = made_up("soap-f5", "kfac")
    suite.refused = {("kfac", "two"): "needs a likelihood"}
    run_on_paper(suite, lambda w, t: math.inf if (w, t.contender.label) == ("one", "adamw") else loss(w, t))
    found = re.findall(r'<td[^>]*data-value="([^"]*)"[^>]*>([^<]*)', page(as_json(suite, [], "")))
    cells = [(value, shown.strip("~*≤≥")) for value, shown in found if shown not in ("adamw", "soap-f5", "kfac")]
    assert {value for value, shown in cells if shown == "–"} == {""}
    for value, shown in cells:
        if shown != "–":
            assert shown.split("/")[0] == format(float(value), ".0f" if "/" in shown else ".2f")


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
    assert tables.filled(text, json.loads(RESULTS.read_text(encoding="utf-8"))) == text


def test_what_the_documentation_says_of_the_results_is_so() -> None:
    """Whoever runs more contenders reads the page again."""
    results = json.loads(RESULTS.read_text())
    summary, cells = results["summary"]["one_setting"], results["cells"]["one_setting"]
    names = ("kl-soap-f4", "soap-f5", "soap-f10", "muon")
    assert [round(summary[name]["steps"], 2) for name in names] == [0.54, 0.55, 0.57, 0.60]
    assert [round(summary[name]["time"], 2) for name in names] == [0.85, 0.79, 0.78, 0.77]
    assert [name for name in summary if summary[name]["worst"] <= 1 and name != "adamw"] == [
        *("kl-soap-f4", "soap-f10", "pytorch_optimizer.soap")
    ]
    behind = {name: {task for task, cell in cells[name].items() if cell["steps"] > 1} for name in cells}
    assert (behind["soap-f5"], behind["muon"]) == ({"photo"}, {"photo"})
    assert (behind["normuon"], behind["shampoo"]) == ({"lstm", "convnet"}, {"lstm", "convnet", "lora"})
    met = [name for name, row in summary.items() if row["steps"] <= 1 / 1.6 and row["time"] <= 1 / 1.3]
    assert [name for name in met if not summary[name]["significantly_worse"]] == ["muon"]
    assert [round(1 / summary[name]["time"], 2) for name in ("kl-soap-f4", "soap-f10")] == [1.17, 1.28]
    assert cells["muon"]["photo"]["final"] / cells["adamw"]["photo"]["final"] == pytest.approx(1.015, abs=5e-4)
    for label, ends in (("soap-f", (1.1, 2.1)), ("muon", (1.1, 1.9))):
        times = [cell["step_time"] for name in cells if name.startswith(label) for cell in cells[name].values()]
        assert (round(min(times), 1), round(max(times), 1)) == ends


def test_what_the_documentation_says_of_single_workloads_is_so() -> None:
    results = json.loads(RESULTS.read_text())
    tuned, cells = results["cells"]["tuned"], results["cells"]["one_setting"]
    gains = {
        name: {task for task, cell in tuned[name].items() if cell["steps"] < 1 and cell["significant"]}
        for name in tuned
    }
    missed = {name: {task for task, cell in tuned[name].items() if cell["bound"] == "≥"} for name in tuned}
    for column in (tuned, cells):
        on_photo = {name: row["photo"] for name, row in column.items() if "photo" in row}
        assert [n for n, cell in on_photo.items() if cell["steps"] < 1 and cell["significant"]] == ["normuon"]
    assert missed["kfac"] == {"lstm", "convnet", "photo", "lora"}
    assert round(1 / tuned["kfac"]["autoencoder"]["steps"], 1) == 6.0
    others = [1 / tuned["kfac"][task]["steps"] for task in ("stdlib", "vit", "mlp")]
    assert (round(min(others), 1), round(max(others), 1)) == (1.3, 1.5)
    times = [cell["step_time"] for cell in tuned["kfac"].values()]
    assert (round(min(times), 1), round(max(times), 1)) == (1.2, 2.3)
    for task, cell in tuned["ekfac"].items():
        assert cell["steps"] / tuned["kfac"][task]["steps"] == pytest.approx(1, abs=0.1), task
        assert cell["step_time"] > tuned["kfac"][task]["step_time"]
    assert gains["adamuon"] == {"stdlib", "vit", "lora"}
    assert gains["dion2"] == {"stdlib", "autoencoder", "diffusion"}
    assert len(missed["sgd"]) == 5
    for column in ("tuned", "one_setting"):
        for name in ("lion", "dion2", "adamuon", "sgd", "pytorch_optimizer.schedule_free"):
            assert results["summary"][column][name]["steps"] > 1
    for task, cell in cells["pytorch_optimizer.muon"].items():
        assert cell["steps"] / cells["muon"][task]["steps"] == pytest.approx(1, abs=0.1), task


def test_workloads_have_a_line_each_in_80_columns(capsys) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    console = Console(width=80)
    assert not fits(console, by_workload(results, "tuned").transposed().for_console())
    for kind in ("summary", "cells"):
        results[kind]["tuned"] = {
            name: results[kind]["tuned"][name] for name in ("soap-f5", "muon", "normuon", "adamw")
        }
    table = by_workload(results, "tuned").transposed().for_console()
    assert fits(console, table)
    console.print(table)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == list(results["summary"]["tuned"])
    assert [line.split()[0] for line in lines] == [workload["name"] for workload in results["workloads"]]
