"""``steepest bench --engine``: what it measures, and that the documentation says the same. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.bench import engine


def bench(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_engine_is_timed_on_many_small_matrices(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "COUNTS", (4, 8))
    monkeypatch.setattr(engine, "IN_GROUPS", 8)
    run = bench("--engine", "--optimizers", "soap-f10, muon", "--steps", 2, "--out", tmp_path)
    assert run.exit_code == 0
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert [row["optimizer"] for row in rows] == [*engine.PEERS, "soap-f10", "muon"]
    assert all(row["groups"] > 0 and row["matrices"].keys() == {"4", "8"} for row in rows)
    head, base = run.output.splitlines()[0], run.output.splitlines()[3].split()
    assert "4" in head
    assert "8 groups" in head
    assert base[:2] == ["torch", "AdamW(foreach)"]
    assert base[3] == base[5] == "1.00"


@pytest.mark.parametrize("other", ["--count", "--peers", "--shapes=moe", "--depth=2", "--warmup=3"])
def test_the_engine_is_timed_alone(other):
    run = bench("--engine", other)
    assert run.exit_code == 2
    assert run.output.endswith(f"on shapes of its own; leave out {other.partition('=')[0]}\n")


def test_the_page_has_the_engines_times_that_were_measured():
    root = Path(__file__).parents[2]
    rows = json.loads((root / "benchmarks/results/bench_engine.json").read_text())["rows"]
    base, page = rows[0]["matrices"], (root / "docs/benchmarks.md").read_text()
    for row in rows:
        ratios = [*(row["matrices"][count] / base[count] for count in base), row["by_one_group"]]
        assert f"| {row['optimizer']} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |" in page
