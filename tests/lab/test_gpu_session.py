"""The GPU script's session: sections in processes of their own, whatever happens in one. No time is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import record, session
from gpu.summary import summary

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "benchmarks/gpu", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280, check=False)


@pytest.fixture
def sections(monkeypatch):
    """Takes functions for sections, which then are all that there is."""

    def replace(**functions: Any) -> None:
        monkeypatch.setattr(session, "SECTIONS", dict.fromkeys(functions, 10.0))
        monkeypatch.setattr(session, "import_module", lambda name: SimpleNamespace(run=functions[name.split(".")[1]]))

    return replace


def test_the_command_runs_sections_and_keeps_others(tmp_path):
    (tmp_path / record.FILE).write_text(
        json.dumps({"tiny": True, "sections": {"old": {"status": "ran", "reason": "", "seconds": 1, "left_out": [],
                                                       "figures": {"x": 1.5}}}})
    )  # fmt: skip
    done = call("--tiny", "--device", "cpu", "--only", "machine,gates", "--out", tmp_path, "--budget", 1000)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / record.FILE).read_text())
    assert content["command"].startswith("python benchmarks/gpu --tiny --device cpu")
    assert {name: one["status"] for name, one in content["sections"].items()} == dict.fromkeys(
        ("old", "machine", "gates"), "ran"
    )
    assert content["sections"]["machine"]["figures"]["environment"]["torch"] == torch.__version__
    assert content["sections"]["gates"]["left_out"] == ["kernels: they need CUDA"]
    text = (tmp_path / "gpu.txt").read_text()
    assert text in done.stdout
    assert "x: 1.5" in text


def test_a_section_that_raises_keeps_what_it_had(tmp_path, sections):
    def broken(record):
        record.figures["before"] = 1.0
        raise RuntimeError("not today\nnor tomorrow")

    def absent(_):
        raise record.Unavailable("needs a moon")

    sections(a=broken, b=absent, c=lambda record: record.figures.update(x=record.earlier["a"]["before"]))
    assert [session.run_section(name, CPU, tmp_path, 10.0, tiny=True) for name in "abc"] == [0, 0, 0]
    found = record.load(tmp_path)["sections"]
    assert (found["a"]["status"], found["a"]["reason"]) == ("failed", "RuntimeError: not today")
    assert found["a"]["figures"] == {"before": 1.0}
    assert any("in broken" in line for line in found["a"]["traceback"])
    assert (found["b"]["status"], found["b"]["reason"]) == ("skipped", "needs a moon")
    assert (found["c"]["status"], found["c"]["figures"]) == ("ran", {"x": 1.0})


def test_figures_are_written_as_they_come(tmp_path, sections):
    def killed(record):
        record.figures["early"] = 1.0
        record.write()
        raise KeyboardInterrupt

    sections(a=killed)
    with pytest.raises(KeyboardInterrupt):
        session.run_section("a", CPU, tmp_path, 10.0, tiny=True)
    assert record.load(tmp_path)["sections"]["a"]["figures"] == {"early": 1.0}


def test_a_device_that_no_longer_computes_is_told(tmp_path, sections, monkeypatch):
    def lost(_):
        monkeypatch.setattr(session, "_computes", lambda device: False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sections(a=lost)
    assert session.run_section("a", CPU, tmp_path, 10.0, tiny=True) == session.LOST
    assert record.load(tmp_path)["sections"]["a"]["status"] == "failed"


class Processes:
    """Stands in for `subprocess.run`: a section takes so long, and ends with a status or not at all."""

    def __init__(self, monkeypatch, **outcomes: tuple[float, int | None]) -> None:
        self.now, self.started = 1000.0, []
        self.outcomes = outcomes
        monkeypatch.setattr(session.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(session.subprocess, "run", self.run)
        monkeypatch.setattr(session, "SECTIONS", dict.fromkeys(outcomes, 10.0))

    def run(self, words, env, timeout):
        name, share = words[words.index("--section") + 1], float(words[words.index("--budget") + 1])
        seconds, status = self.outcomes[name]
        self.started.append((name, share, env.get("STEEPEST_KERNELS")))
        self.now += min(seconds, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(words, timeout)
        return SimpleNamespace(returncode=status)


def run_all(tmp_path, names: str, budget: float):
    args = SimpleNamespace(out=tmp_path, budget=budget, tiny=False, trace=False, device="cuda")
    return session.run_all(args, list(names), "the command")["sections"]


def test_the_budget_is_shared_and_handed_on(tmp_path, monkeypatch):
    processes = Processes(monkeypatch, a=(10, 0), b=(32, 0), c=(49, 0), d=(1, 0))
    found = run_all(tmp_path, "abcd", 100.0)
    assert processes.started == [("a", 25.0, None), ("b", 30.0, None), ("c", 29.0, None)]
    assert found["d"]["reason"] == "9 s are left of the budget"
    assert found["d"]["status"] == "skipped"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ((5, -11), "its process ended with status -11"),
        ((1e9, None), "was stopped after 45 s"),
        ((5, session.LOST), None),
    ],
)
def test_after_a_lost_device_the_others_run_without_kernels(tmp_path, monkeypatch, outcome, reason):
    processes = Processes(monkeypatch, a=(5, 0), b=outcome, c=(5, 0), d=(5, 0))
    found = run_all(tmp_path, "abcd", 80.0)
    assert [kernels for _, _, kernels in processes.started] == [None, None, "never", "never"]
    assert found.get("b", {}).get("reason") == reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lunch"], "--only lunch: there are machine, correctness,"),
        (["--device", "tpu0"], "tpu0"),
        (["--device", "meta"], "--device meta: must be cuda or cpu"),
        (["--budget", "0", "--device", "cpu"], "--budget 0: must be more than 0 seconds"),
        ([], "torch sees no CUDA device here"),
    ],
)
def test_bad_input_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        session.main(arguments)
    assert message in capsys.readouterr().err


def test_sections_have_files_and_share_eight_minutes():
    assert all((ROOT / f"benchmarks/gpu/{name}.py").exists() for name in session.SECTIONS)
    assert sum(session.SECTIONS.values()) == 450


def test_the_summary_shows_tables_and_failures():
    section = {"status": "ran", "reason": "", "seconds": 1.0, "left_out": ["b"]}
    figures = {"rows": [{"d": 32, "ms": 0.25}, {"d": 64, "error": "no"}], "nested": [{"x": [1]}], "times": {"a": 1.0}}
    failed = section | {"status": "failed", "reason": "no moon", "figures": {}, "left_out": []}
    content = {
        "command": "it",
        "seconds": 2.0,
        "budget": 3.0,
        "sections": {"one": section | {"figures": figures}, "two": failed},
    }
    assert summary(content).splitlines() == [
        *("it", "2 s of 3 s", "", "== one: ran (1.0 s)", "rows:", "  d   ms    error", "  32  0.25", "  64        no"),
        *("times:", "     times", "  a  1", "left out: b", "", "== two: failed: no moon (1.0 s)"),
    ]
