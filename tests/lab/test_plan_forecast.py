"""What ``steepest plan --gpu`` prints, and what the documentation shows of it."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from plans_made_up import steepest_plan

from steepest.lab.plan.devices import GPUS, gpu
from steepest.lab.plan.models import preset
from steepest.lab.plan.plan import look, mesh
from steepest.lab.plan.text import milliseconds

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/scaling.md").read_text()


def test_the_table_and_the_figures():
    arguments = ["--params", "124m,1b", "--block-size", 0, "--gpu", "H200", "--option", "precondition_frequency=10"]
    done = steepest_plan(*arguments)
    assert done.exit_code == 0, done.output
    assert "Predicted for h200" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    found = json.loads(steepest_plan(*arguments, "--json").output)
    direct = look(
        preset("124m", "soap", {"precondition_frequency": 10}), mesh("fsdp", 8), 2**19, device=gpu("h200")
    ).forecast
    assert found[0]["forecast"] == asdict(direct) | {"share": direct.share, "fits": True}
    assert f" {milliseconds(1e3 * direct.step)} " in done.output
    assert f"{direct.share:.1%}" in done.output


def test_a_model_is_trained_at_the_share_that_is_given():
    slow, fast = (
        json.loads(steepest_plan("--params", "124m", "--block-size", 0, "--gpu", "a100", "--json", *more).output)[0]
        for more in ([], ["--mfu", 0.8])
    )
    assert fast["forecast"]["training"] == pytest.approx(slow["forecast"]["training"] / 2)
    assert fast["forecast"]["step"] == slow["forecast"]["step"]


def test_without_a_gpu_nothing_is_predicted():
    done = steepest_plan("--params", "124m", "--block-size", 0)
    assert "redicted" not in done.output
    assert json.loads(steepest_plan("--params", "124m", "--block-size", 0, "--json").output)[0]["forecast"] is None


def test_the_page_shows_what_was_predicted():
    command, *lines = re.search(r"```text\n\$ steepest plan ([^`\n]*--gpu[^`]*)```", PAGE)[1].splitlines()
    done = steepest_plan(*command.split())
    assert [line.rstrip() for line in done.output.splitlines()] == lines


def test_the_page_shows_what_was_measured():
    spec = importlib.util.spec_from_file_location("predict", ROOT / "benchmarks/predict.py")
    predict_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(predict_script)
    rows = json.loads((ROOT / "benchmarks/results/predict.json").read_text())["rows"]
    assert predict_script.table(rows) in PAGE
    assert [row | predict_script.summary(row) for row in rows] == rows
    assert all(abs(row["ratio"] - 1) <= 0.3 and abs(row["state_ratio"] - 1) <= 0.05 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpu", "b3"], "--gpu b3: there are h200, h100, a100, l40s, and here"),
        (["--gpu", "h200", "--mfu", "0"], "--mfu 0.0: must be in (0, 1]"),
        (["--gpu", "h200", "--mfu", "1.5"], "--mfu 1.5: must be in (0, 1]"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments, complaint):
    done = steepest_plan(*arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line


def test_the_help_names_every_gpu():
    text = " ".join(steepest_plan("--help").output.replace("│", " ").split())
    assert all(name in text for name in (*GPUS, "here"))
