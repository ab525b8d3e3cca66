"""Parts of benchmarks/gpu.py whose figures could be wrong without anybody noticing."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import gpu_engine
import gpu_job
import gpu_kernels
import gpu_precision
import gpu_profile
import gpu_steps
import pytest
import torch
from gpu_script import CPU, call


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
    assert found["gates"]["figures"]["undoing"].keys() == {"kernel_ms", "twin_ms"}
    assert any(row["check"].startswith("undoing") and row["ok"] for row in found["kernels"]["figures"]["checks"])


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
    from steepest.engine.phases import phase

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


def test_what_kl_leaves_off_the_diagonal_is_of_covariances():
    """Its state keeps them in their own basis; taken as they stand there they would seem to be turned by 0.8."""
    job = gpu_job.Job(CPU, tiny=True)
    fine = next(gpu_precision.variants())
    assert gpu_precision.compare(fine, {"use_kl_shampoo": True}, job)["off_diagonal"] < 0.5


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
