"""The benchmark of second order on an autoencoder, what it found, and that the documentation says the same."""

from __future__ import annotations

import json
from pathlib import Path

import autoencoder as benchmark
import pytest
import torch

ROOT = Path(__file__).parents[2]
FOUND = json.loads(benchmark.RESULTS.read_text())


def final(name: str) -> list[float]:
    return [run["excess"] for run in FOUND[name]["runs"]]


@pytest.mark.parametrize("name", benchmark.ROWS)
def test_everybody_was_tuned_alike(name) -> None:
    row, found = benchmark.ROWS[name], FOUND[name]
    tuning = found["tuning"]
    assert found["steps"] == row.steps
    assert [trial["setting"] for trial in tuning] == (row.settings if row.axes else [])
    assert len(tuning) == (0 if "defaults" in name else 8)
    assert {trial["seed"] for trial in tuning} <= {0}
    assert [run["seed"] for run in found["runs"]] == list(benchmark.SEEDS)
    assert all(run["setting"] == found["best"] for run in found["runs"])
    if tuning:
        least = min(trial["excess"] for trial in tuning if trial["excess"] is not None)
        assert next(trial["excess"] for trial in tuning if trial["setting"] == found["best"]) == least


def test_the_documentation_has_the_table() -> None:
    """Print it with ``python benchmarks/autoencoder.py --table``."""
    text = (ROOT / "docs/which-optimizer.md").read_text()
    assert benchmark.table(FOUND) in text


def test_what_the_documentation_says_of_it_is_so() -> None:
    """Of times it says little; the bounds leave room for another run's."""
    mean = {name: sum(final(name)) / 3 for name in benchmark.ROWS}
    assert max(final("kfac, 730 steps")) < min(final("soap f=1"))
    assert max(final("soap f=1")) < min(final("adamw, 1400 steps"))
    seconds = {name: sum(run["seconds"] for run in FOUND[name]["runs"]) for name in benchmark.ROWS}
    assert max(seconds["kfac, 730 steps"], seconds["adamw, 1400 steps"]) < 1.25 * seconds["soap f=1"]
    assert 0.9 < mean["kfac"] / mean["soap f=1"] < 1.1
    assert seconds["kfac"] < 0.8 * seconds["soap f=1"]
    assert mean["kfac, empirical"] > 1.5 * mean["soap f=1"]
    assert mean["ekfac"] > mean["kfac"]
    held_out = {name: [run["held_out_error"] for run in FOUND[name]["runs"]] for name in benchmark.ROWS}
    assert max(held_out["soap f=1"]) < min(error for name in held_out if name != "soap f=1" for error in held_out[name])


def test_the_rate_falls_in_the_second_half() -> None:
    rates = [benchmark.rate(step, 400) for step in range(1, 401)]
    assert set(rates[:201]) == {1.0}
    assert rates[300] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 200)


def test_a_training_says_where_it_passed(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "LEVELS", (1000.0, 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    row = benchmark.Row(benchmark.adamw, steps=20)
    runs = [benchmark.train(row, {"lr": 1e-2, "beta2": 0.95}, 0, benchmark.Autoencoder()) for _ in range(2)]
    torch.set_num_threads(before)
    assert runs[0]["excess"] == runs[1]["excess"] < 30
    assert runs[0]["passed"]["1000.0"]["steps"] == 10
    assert "0.0" not in runs[0]["passed"]
    assert runs[0]["passed"]["1000.0"]["seconds"] <= runs[0]["seconds"]


def test_a_row_of_the_table() -> None:
    def run(excess, steps):
        passed = {"1.5": {"steps": steps, "seconds": steps / 100}} if steps else {}
        return {"excess": excess, "passed": passed, "seconds": 2.0, "held_out_error": 0.5}

    known = {"adamw": {"runs": [run(1.4, 90), run(1.45, 110), run(None, None)]}}
    assert benchmark.table(known).splitlines()[-1] == (
        "| adamw | 1.4, 1.45, diverged | 90-110 (0.9-1.1), 1 never | never | 2.0 | 0.50 |"
    )
