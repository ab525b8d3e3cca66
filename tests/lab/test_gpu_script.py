"""benchmarks/gpu.py on a CPU: every section runs on tiny sizes, whatever goes wrong is recorded. No time is judged."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steepest.lab import bench_peers
from steepest.lab.bench_crew import Family

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
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


def load(name: str) -> Any:
    """A file of benchmarks/, as its own neighbours import it."""
    if name == "gpu":
        spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpu"] = module
        spec.loader.exec_module(module)  # puts its folder on the path
        return module
    return importlib.import_module(name)


gpu = load("gpu")
gpu_job, gpu_goals, gpu_kernels = map(load, ("gpu_job", "gpu_goals", "gpu_kernels"))
gpu_engine, gpu_precision, gpu_profile, gpu_steps = map(
    load, ("gpu_engine", "gpu_precision", "gpu_profile", "gpu_steps")
)
NAMES = [section.name for section in gpu.SECTIONS]


def call(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *prefix, str(SCRIPT), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280, check=False)


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


class Clock:
    """One that only goes where it is pushed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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


# Steps and goals.


def test_plans_name_what_the_goals_ask_for(monkeypatch):
    """Whoever a goal is about is in a plan, under that name, in float32 and in TF32."""
    if not all(importlib.util.find_spec(package) for package in bench_peers.PACKAGES):
        pytest.skip("needs the extra peers")
    job = gpu_job.Job(CPU, earlier={"gates": {"suggested": {"tf32": 1024}}})
    sets = []
    for plan in gpu_steps.PLANS:
        shapes = gpu_steps.shapes_of(plan.shapes, plan.depth)
        everybody, missing = gpu_steps.crew(plan, job, max(max(pair) for pair in shapes.matrices))
        assert missing == []
        assert len({one.label for one in everybody}) == len(everybody)
        assert all(plan.steps % max(1, one.family.frequency) == 0 for one in everybody)
        times = {"mean": 6.0, "max_over_mean": 1.2}
        made = [
            {"contender": one.label, "family": str(one.family), "ours": one.ours, "error": "", "wall_ms": times}
            for one in everybody
        ]
        about = {"name": shapes.name, "layers": shapes.layers, "of_layers": shapes.of_layers, "clock": "wall_ms"}
        sets.append({**about, "rows": made})
    found = {row["goal"]: row for row in gpu_goals.goals(sets)}
    for row in found.values():
        assert row["float32"] is not None or "longest" in row["goal"], row
        assert row["tf32"] is not None, row
    assert found["GPT-2 124M, SOAP f = 10"]["float32"] == 6.0
    assert found["GPT-2 124M, SOAP f = 10"]["float32_met"]
    assert found["GPT-2 124M, one-sided SOAP f = 10"]["tf32_of_limit"] == 2.0
    assert not found["GPT-2 124M, one-sided SOAP f = 10"]["tf32_met"]
    assert found["1B, SOAP f = 10"]["tf32"] == 6.0  # all 16 layers
    assert found["1B, SOAP f = 10"]["float32"] == 6.0 * 16 / 2  # cut to 2
    assert found["Muon over torch.optim.Muon"]["float32"] == 1.0
    labels = {row["contender"] for one in sets for row in one["rows"]}
    assert {"muon without kernels", "muon suggested gates"} <= labels


def test_a_goal_is_about_the_fastest_peer():
    def row(contender: str, mean: float, ours: bool = False, error: str = "", family: str = "soap") -> dict[str, Any]:
        times = {"wall_ms": {"mean": mean}}
        return {"contender": contender, "family": family, "ours": ours, "error": error, **times}

    rows = [row("soap-f10", 3.0, ours=True), row("a", 12.0), row("b", 10.0), row("c", 1.0, error="no memory")]
    rows += [row("d", 1.0, family="muon"), row("a in TF32", 4.0), row(f"soap-f10({gpu_goals.HIGH})", 1.0, ours=True)]
    one = {"name": "gpt2-124m", "layers": 12, "of_layers": 12, "clock": "wall_ms", "rows": rows}
    assert gpu_goals.over_peers("soap-f10")([one], False) == 0.3
    assert gpu_goals.over_peers("soap-f10")([one], True) == 0.25
    assert gpu_goals.over_peers("soap-f1")([one], False) is None


def test_who_runs_out_of_time_keeps_whole_periods():
    from steepest.lab.bench_measure import Measured

    entrant = SimpleNamespace(family=Family("soap", 4))
    over = f"{gpu_steps.OutOfTime.__name__}: the time"
    one = gpu_steps.whole_periods(Measured(entrant, wall=[1.0] * 7, cpu=[2.0] * 7, phases=[{}] * 7, error=over))
    assert (len(one.wall), len(one.cpu), len(one.phases), one.error) == (4, 4, 4, "")
    short = gpu_steps.whole_periods(Measured(entrant, wall=[1.0] * 3, error=over))
    assert (short.wall, short.error) == ([], over)
    failed = gpu_steps.whole_periods(Measured(entrant, wall=[1.0] * 7, error="no memory"))
    assert failed.error == "no memory"


def test_time_that_is_up_ends_a_plan(tmp_path):
    clock = Clock()
    job = gpu_job.Job(CPU, tiny=True, clock=clock)
    plan = gpu_steps.Plan("tiny", "soap-f2, adamw", 4, 2, peers=False)

    def ticking() -> float:
        clock.now += 1  # with every look, of which there is one behind each thing that is done
        return clock.now

    job.clock = ticking
    found = gpu_steps.run(plan, job, until=clock.now + 10)  # both are made, and five steps taken by each
    soap, adamw = found["rows"]
    assert (soap["error"], soap["steps"], len(soap["wall_ms_by_step"])) == ("", 3, 2)
    assert (adamw["error"], adamw["steps"], len(adamw["wall_ms_by_step"])) == ("", 3, 3)


@pytest.mark.parametrize("package", ["", *bench_peers.PACKAGES])
def test_first_bases_are_made_up_for_everybody(package):
    """In a first step, ours or a peer's; and real decompositions are back afterwards."""
    if package:
        pytest.importorskip(package)
    eigh = torch.linalg.eigh
    job = gpu_job.Job(CPU, tiny=True)
    plan = gpu_steps.Plan("tiny", "soap-f2, kl-soap-f2, moso", 2, 1, peers=bool(package))
    everybody, _ = gpu_steps.crew(plan, job, 24)
    everybody = [one for one in everybody if one.ours == (not package) and one.label.startswith(package)]
    assert everybody

    for one in everybody:
        params = [torch.nn.Parameter(torch.zeros(24, 16))]
        bases: dict[Any, torch.Tensor] = {}
        scope = gpu_steps.bounded(one.scope, math.inf, lambda: 0.0, bases)
        with scope():
            optimizer = one.make(params)
        params[0].grad = torch.randn(24, 16)
        with scope():
            optimizer.step()
        assert bases, one.label
        assert torch.linalg.eigh is eigh
        assert all(torch.allclose(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype), atol=1e-5) for Q in bases.values())


# Parts whose figures could be wrong without anybody noticing.


def test_first_bases_take_what_solvers_took():
    shapes = gpu_steps.shapes_of("tiny")  # 24 × 16 twice, 16 × 16
    timed = [{"d": d, "ms": ms, "precision": "float64"} for d, ms in ((16, 10.0), (24, 100.0))]
    assert gpu_steps.first_bases(shapes, [*timed, {"d": 24, "ms": 1.0, "precision": "high"}]) == pytest.approx(0.24)
    assert gpu_steps.first_bases(shapes, timed[:1]) == "not timed: [24]"


def test_a_check_that_raises_has_failed():
    job = gpu_job.Job(CPU)

    def broken() -> None:
        raise ZeroDivisionError

    def absent() -> None:
        raise gpu_job.Unavailable("needs CUDA")

    job.checked("a", broken)
    job.checked("b", absent)
    job.check("c", math.nan, 1.0)
    job.check("d", 1.0, 1.0)
    assert [row["ok"] for row in job.figures["checks"]] == [False, None, False, True]
    assert job.figures["checks"][0]["note"] == "ZeroDivisionError"


def test_a_wrong_kernel_is_found(monkeypatch):
    """With a "kernel" in the twin's place whose result is a little off, not symmetric, and never twice the same."""
    job = gpu_job.Job(CPU, tiny=True)
    exact = torch.ones(2, 3, 3, dtype=torch.float64)
    calls = iter(range(100))

    def work(which: slice = slice(None)) -> torch.Tensor:
        off = torch.zeros(2, 3, 3)
        if gpu_kernels.kernels._mode == "always":
            off[:, 0, 1] = 1e-3 * (1 + next(calls))
        return (exact.float() + off)[which]

    gpu_kernels._compare(job, "it", "float32", work, exact, True)
    failed = [row["check"] for row in job.figures["checks"] if row["ok"] is False]
    assert failed == [
        *("it: kernel and float64", "it: launched", "it: repeated", "it: alone as in a batch", "it: symmetric")
    ]


@pytest.mark.slow
def test_kernels_pass_in_the_interpreter(tmp_path, monkeypatch):
    """What a GPU would do in these sections, entry by entry in NumPy."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = call("--tiny", "--device", "cpu", "--only", "kernels,engine,gates", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    checks = [row for name in ("kernels", "engine") for row in found[name]["figures"]["checks"]]
    assert all(row["ok"] is True for row in checks if "waits for the device" not in row["check"])
    assert {"gram", "polynomial", "adam"} <= {row["what"] for row in found["gates"]["figures"]["figures"]}
    assert "suggested" in found["gates"]["figures"]


@pytest.mark.parametrize("name", ["soap", "kl", "muon", "adamw"])
def test_a_trace_of_a_nan_is_found(name, monkeypatch):
    job = gpu_job.Job(CPU, tiny=True)
    step = gpu_engine.Training.step

    def leaky(self, number, spoilt=()):
        step(self, number, spoilt)
        for i in spoilt:
            next(iter(self.optimizer.state[self.params[i]].values())).add_(1)

    monkeypatch.setattr(gpu_engine.Training, "step", leaky)
    gpu_engine._no_trace(job, name, gpu_engine.CREW[name])
    assert job.figures["checks"][0]["ok"] is False


def test_factors_are_rounded_in_their_phase_alone():
    x = torch.full((2, 2), 1 + 2.0**-12)
    from steepest.phases import phase

    with gpu_precision.rounded({"feed": "tf32", "project": "bfloat16"}):
        outside, feed, project = x @ x, phase("feed")(lambda: x @ x)(), phase("project")(lambda: (x + 2**-9) @ x)()
    assert torch.equal(outside, x @ x)
    assert torch.equal(feed, torch.full((2, 2), 2.0))
    assert torch.equal(project, torch.full((2, 2), 2.0))


def test_coarser_products_turn_updates_further():
    job = gpu_job.Job(CPU, tiny=True)
    names = ("float32", "all tf32", "all bfloat16")
    rows = {v.name: gpu_precision.compare(v, {}, job) for v in gpu_precision.variants() if v.name in names}
    fine, tf32, bfloat16 = (rows[name]["one_step_degrees"] for name in names)
    assert fine < 1e-3 < 10 * tf32
    assert fine < tf32 < bfloat16 < 5


def test_suggestions_follow_from_angles_and_bases():
    good = dict.fromkeys(("one_step_degrees", "at_refresh_degrees", "run_degrees"), 0.1)
    good |= {"orthogonality": 1e-6, "off_diagonal": 0.05}

    def row(variant: str, **changed: float) -> dict[str, Any]:
        return {"rule": "soap", "variant": variant, **good, **changed}

    rows = [row("float32"), row("project tf32"), row("project bfloat16", run_degrees=3.0)]
    rows += [row("feed tf32", orthogonality=math.nan), row("feed bfloat16")]
    rows += [row("refresh tf32", at_refresh_degrees=30.0), row("refresh bfloat16", off_diagonal=0.06)]
    assert gpu_precision.suggest(rows) == {"soap": {"project": "tf32", "feed": "float32", "refresh": "tf32"}}


def test_a_profile_adds_up():
    from torch.autograd import DeviceType

    def event(name: str, start: float, end: float, on: Any = DeviceType.CUDA, mark: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=on, is_user_annotation=mark, cpu_parent=None)

    events = [
        event(gpu_profile.STEP, 0.0, 4000.0, DeviceType.CPU, True),
        event(gpu_profile.STEP, 0.0, 9000.0, mark=True),
    ]
    events += [event("gemm", 1000.0, 3000.0), event("gemm", 2000.0, 4000.0), event("Memcpy HtoD", 6000.0, 8000.0)]
    events += [event("Optimizer.step#Muon.step", 0.0, 9000.0), event("aten::mm", 0.0, 1.0, DeviceType.CPU)]
    found = gpu_profile.summary(events, DeviceType.CUDA)
    assert (found["step_ms"], found["host_ms"], found["busy_ms"]) == (8.0, 4.0, 5.0)
    assert found["busy_share"] == 5 / 8
    assert (found["launches"], found["copies"]) == (2, 1)
    assert found["kernels"][0] == {"name": "gemm", "calls": 2, "ms": 4.0}
