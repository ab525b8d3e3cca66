"""benchmarks/gpu.py on a CPU: every section runs on tiny sizes, whatever goes wrong is recorded. No time is judged."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_goals
import gpu_job
import pytest
import torch
from gpu_script import CPU, SCRIPT, Clock, call

WITHOUT = """
import importlib.util, runpy, sys

MISSING = {"rich", "typer", "plotly", "heavyball", "pytorch_optimizer", "triton", "sklearn"}
found = importlib.util.find_spec


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
importlib.util.find_spec = lambda name, package=None: None if name in MISSING else found(name, package)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script run as if only torch were installed."""
NAMES = [section.name for section in gpu.SECTIONS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of everything: its folder, what it printed, and its figures."""
    out = tmp_path_factory.mktemp("gpu")
    done = call("--tiny", "--device", "cpu", "--out", out, "--trace", "--budget", 3000)  # however busy the machine is
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout, json.loads((out / "gpu.json").read_text())


def numbers(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """All leaves that are no words."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in numbers(item, f"{path}/{key}")]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value) for leaf in numbers(item, f"{path}/{i}")]
    return [] if isinstance(value, str) else [(path, value)]


# Everything, on tiny sizes.


def test_every_section_runs(whole):
    _, _, content = whole
    assert content["command"].startswith("python benchmarks/gpu.py --tiny --device cpu")
    assert content["versions"]["torch"] == torch.__version__
    assert content["device"] == "cpu"
    assert list(content["sections"]) == NAMES
    for name, section in content["sections"].items():
        assert (section["status"], section["reason"]) == ("ran", ""), name
        assert section["figures"], name
        assert section["seconds"] >= 0
    assert content["sections"]["gates"]["left_out"] == ["kernels: they need CUDA"]


def test_figures_are_finite_numbers(whole):
    sections = whole[2]["sections"]
    unknown = {path for path, value in numbers(sections) if value is None}
    goals = {f"/steps/figures/goals/{i}" for i in range(len(gpu_goals.GOALS))}
    checks = sections["kernels"]["figures"]["checks"], sections["engine"]["figures"]["checks"]
    not_here = {f"/{name}/figures/checks/{i}" for name, rows in zip(("kernels", "engine"), checks, strict=True)
                for i, row in enumerate(rows) if row["note"].startswith("needs CUDA")}  # fmt: skip
    assert {path.rpartition("/")[0] for path in unknown} <= goals | not_here
    assert all(math.isfinite(value) for _, value in numbers(sections) if value is not None)
    for row in sections["machine"]["figures"]["products"]:
        assert min(row["float32"], row["tf32"], row["bfloat16"]) > 0
    for row in sections["solvers"]["figures"]["rows"]:
        assert row["ms"] > 0
        assert row.get("orthogonality", 0) < 1e-5
    for one in sections["steps"]["figures"]["sets"]:
        assert all(row["error"] == "" and len(row["wall_ms_by_step"]) == one["steps"] for row in one["rows"])
    for step in sections["profile"]["figures"]["steps"].values():
        assert step["launches"] > 0
        assert 0 < step["busy_share"] <= 1
        assert sum(kernel["ms"] for kernel in step["kernels"]) <= step["step_ms"]


def test_what_can_be_checked_on_a_cpu_holds(whole):
    for name in ("kernels", "engine"):
        checks = whole[2]["sections"][name]["figures"]["checks"]
        assert all(row["ok"] is not False for row in checks), checks
        assert sum(row["ok"] is True for row in checks) >= 20
        assert all(row["note"].startswith("needs CUDA") for row in checks if row["ok"] is None)


def test_the_summary_says_it_all(whole):
    out, printed, content = whole
    text = (out / "gpu.txt").read_text()
    assert text in printed
    for name in NAMES:
        assert f"== {name}: ran" in text
    assert "GPT-2 124M, SOAP f = 10: goal 12 ms; float32 not measured" in text
    assert "\x1b" not in text
    labels = [row["contender"] for one in content["sections"]["steps"]["figures"]["sets"] for row in one["rows"]]
    assert all(label in text for label in labels)
    assert len(list(out.glob("trace-*.json"))) == len(content["sections"]["profile"]["figures"]["steps"])


@pytest.mark.slow
def test_torch_alone_will_do(tmp_path):
    done = call(
        "--tiny", "--device", "cpu", "--only", "machine,steps,profile", "--out", tmp_path, prefix=("-c", WITHOUT)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rich is not installed" in done.stdout
    assert "heavyball is not installed: its optimizers are missing" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(("machine", "steps", "profile"), "ran")
    muons = [row["contender"] for row in found["steps"]["figures"]["sets"][1]["rows"] if "Muon" in row["contender"]]
    assert muons == ["torch.optim.Muon", "torch.optim.Muon in TF32"]


# The session.


def section(name: str, run, weight: float = 10.0, least: float = 2.0) -> Any:
    return SimpleNamespace(name=name, run=run, weight=weight, least=least)


def session(tmp_path, clock=None, **options):
    said: list[str] = []
    made = gpu.Session(CPU, tmp_path, clock=clock or Clock(), say=said.append, **options)
    return made, said


def test_what_raises_is_recorded_and_the_rest_goes_on(tmp_path):
    def broken(job):
        job.figures["before"] = 1.0
        raise RuntimeError("not today\nnor tomorrow")

    def absent(job):
        raise gpu_job.Unavailable("needs a moon")

    made, _ = session(tmp_path)
    made.run([section("a", broken), section("b", absent), section("c", lambda job: job.figures.update(x=math.nan))])
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert (found["a"]["status"], found["a"]["reason"]) == ("failed", "RuntimeError: not today")
    assert found["a"]["figures"] == {"before": 1.0}
    assert any("in broken" in line for line in found["a"]["traceback"])
    assert (found["b"]["status"], found["b"]["reason"]) == ("skipped", "needs a moon")
    assert (found["c"]["status"], found["c"]["figures"]) == ("ran", {"x": None})


def test_the_budget_is_kept(tmp_path):
    clock = Clock()
    done: list[str] = []

    def hungry(job):
        while job.fits(f"part {len(done)}", 3.0):  # as long as it takes
            clock.now += 3.0
            done.append("part")

    def greedy(job):
        clock.now += 45.0  # whatever it was given

    made, said = session(tmp_path, clock, budget=100.0)
    plan = [section("a", hungry, weight=30), section("b", greedy, weight=30), section("c", hungry, weight=40, least=40)]
    content = made.run([*plan, section("d", hungry, weight=20)])
    found = content["sections"]
    assert clock.now - 1000 <= 100
    assert [found[name]["status"] for name in "abcd"] == ["ran", "ran", "skipped", "ran"]
    assert found["a"]["seconds"] == 24  # of 25: 100 · 30 / 120
    assert found["a"]["left_out"] == ["part 8"]
    assert found["c"]["reason"] == "31 s are left of the budget, and it takes 40 s at least"
    assert found["d"]["seconds"] == 30  # what c left
    assert any("c: skipped" in line for line in said)


def test_figures_are_written_as_they_come(tmp_path):
    def killed(job):
        job.figures["early"] = 1.0
        job.keep()
        raise KeyboardInterrupt

    made, _ = session(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made.run([section("a", lambda job: job.figures.update(x=2.0)), section("b", killed)])
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert (found["a"]["figures"], found["b"]["figures"]) == ({"x": 2.0}, {"early": 1.0})


def test_sections_measured_anew_leave_others(tmp_path):
    for number, names in enumerate(("ab", "b")):
        made, _ = session(tmp_path)
        made.run([section(name, lambda job, number=number: job.figures.update(x=number)) for name in names])
    assert [made.content["sections"][name]["figures"]["x"] for name in "ab"] == [0, 1]
    made, _ = session(tmp_path, tiny=True)  # of another kind
    assert list(made.run([section("b", lambda job: None)])["sections"]) == ["b"]


def test_a_lost_device_means_a_process_without_kernels(tmp_path, monkeypatch):
    started: list[Any] = []
    monkeypatch.setattr(gpu.Session, "_alive", lambda self: False)
    monkeypatch.setattr(gpu.os, "execve", lambda *arguments: started.append(arguments))
    clock = Clock()

    def lost(job):
        clock.now += 30
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    made, _ = session(tmp_path, clock, budget=100.0, tiny=True)
    made.run([section("kernels", lost), section("steps", None), section("profile", None)])
    ((_, words, environment),) = started
    assert words[words.index("--only") + 1] == "steps,profile"
    assert words[words.index("--budget") + 1] == "70"
    assert "--tiny" in words
    assert "--trace" not in words
    assert environment["STEEPEST_KERNELS"] == "never"
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["kernels"]["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lunch"], "--only lunch: there are machine, kernels,"),
        (["--only", ","], "--only ,: there are"),
        (["--device", "tpu0"], "tpu0"),
        (["--device", "meta"], "--device meta: must be cuda or cpu"),
        (["--budget", "0", "--device", "cpu"], "--budget 0: must be more than 0 seconds"),
        ([], "torch sees no CUDA device here"),
    ],
)
def test_bad_input_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert message in capsys.readouterr().err


def test_sections_have_files_and_shares():
    assert {section.module for section in gpu.SECTIONS} <= {path.stem for path in SCRIPT.parent.glob("gpu_*.py")}
    assert sum(section.weight for section in gpu.SECTIONS) == 450
