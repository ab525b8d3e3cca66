"""The GPU script's sections on a CPU, at tiny sizes, and figures that could be wrong without anybody noticing."""

from __future__ import annotations

import importlib.util
import math
import time
from types import SimpleNamespace
from typing import Any

import gpu.profile
import gpu.steps
import precision
import pytest
import torch
from gpu import correctness, gates, machine, solvers
from gpu import precision as precision_section
from gpu.record import Record
from torch.autograd import DeviceType

from steepest.engine.phases import phase
from steepest.lab.shared.peers import PACKAGES

CPU = torch.device("cpu")


def figures(section, out=None, **options) -> dict[str, Any]:
    """What a section finds at tiny sizes."""
    record = Record(CPU, tiny=True, out=out, **options)
    section.run(record)
    assert set(record.left_out) <= {"kernels: they need CUDA"}
    return record.figures


def numbers(value: Any) -> list[float]:
    """All numbers in figures."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in numbers(item)]
    return [] if isinstance(value, str) else [value]


@pytest.mark.parametrize("section", [machine, gates, solvers, precision_section], ids=lambda module: module.__name__)
def test_sections_find_finite_numbers(section):
    found = figures(section)
    assert len(numbers(found)) >= 1
    assert all(math.isfinite(value) for value in numbers(found))
    for row in found.get("rows", ()):
        assert row.get("ms", 1) > 0
        assert row.get("orthogonality", 0) < 0.02


def test_the_tests_are_collected():
    output = figures(correctness, until=time.monotonic() + 200)["output"]
    assert any("test_replays_are_the_same_to_the_last_bit" in line for line in output)


def test_steps_are_timed():
    found = figures(gpu.steps)
    for one in found["sets"]:
        assert all(row["error"] == "" and len(row["wall_ms_by_step"]) == 2 for row in one["rows"])
    labels = [row["contender"] for row in found["step times, ms"]]
    assert "soap-f2(fp32_matmul_prec='high') without kernels" in labels
    assert "torch.optim.Muon" in labels


def test_steps_are_profiled(tmp_path):
    found = figures(gpu.profile, tmp_path, trace=True)
    for step in found["steps"]:
        assert step["launches"] > 0
        assert 0 < step["busy_share"] <= 1
        assert sum(row["ms"] for row in found["kernels"] if row["step"] == step["step"]) <= step["ms"]
    assert len(list(tmp_path.glob("trace-*.json"))) == len(found["steps"]) == 3


def test_parts_that_do_not_fit_are_named():
    clock = iter(range(100))
    record = Record(CPU, tiny=True, until=3.5, clock=lambda: next(clock))
    assert [record.fits(part, 1.0) for part in "abcd"] == [True, True, True, False]
    assert record.left_out == ["d"]


# Steps.


def test_plans_are_whole_periods_of_distinct_entrants():
    if not all(importlib.util.find_spec(package) for package in PACKAGES):
        pytest.skip("needs the extra peers")
    labels = set()
    for plan in gpu.steps.PLANS:
        everybody, missing = gpu.steps.entrants(plan, {"tf32": 1024})
        assert missing == []
        assert len({one.label for one in everybody}) == len(everybody)
        assert all(plan.steps % max(1, one.family.frequency) == 0 for one in everybody)
        labels |= {one.label for one in everybody}
    assert {"muon without kernels", "muon suggested gates", "heavyball.SOAP f10 in TF32"} <= labels


def test_entrants_in_tf32_are_compared_with_each_other():
    plan = gpu.steps.Plan("tiny", f"soap-f2, soap-f2({gpu.steps.HIGH}), muon", 2, 2, 0)
    everybody, _ = gpu.steps.entrants(plan, None)
    kinds = {one.label: one.family.kind for one in everybody}
    assert kinds["soap-f2"] == "soap"
    assert kinds[f"soap-f2({gpu.steps.HIGH})"] == "soap in TF32"
    assert all((kind == "soap in TF32") == ("TF32" in label) for label, kind in kinds.items() if "." in label)


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_first_bases_are_made_up_for_everybody(package):
    """In a first step, ours or a peer's; and real decompositions are back afterwards."""
    if package:
        pytest.importorskip(package)
    eigh = torch.linalg.eigh
    plan = gpu.steps.Plan("tiny", "soap-f2, kl-soap-f2, moso", 2, 1, 0, peers=bool(package))
    everybody, _ = gpu.steps.entrants(plan, None)
    everybody = [one for one in everybody if one.ours == (not package) and one.label.startswith(package)]
    assert everybody
    for one in everybody:
        params = [torch.nn.Parameter(torch.zeros(24, 16))]
        bases: dict[Any, torch.Tensor] = {}
        scope = gpu.steps.within(one.scope, gpu.steps.made_up_first(bases))
        with scope():
            optimizer = one.make(params)
        params[0].grad = torch.randn(24, 16)
        with scope():
            optimizer.step()
        assert bases, one.label
        assert torch.linalg.eigh is eigh
        assert all(torch.allclose(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype), atol=1e-5) for Q in bases.values())
        bases.clear()
        with scope():
            optimizer.step()
        assert not bases


# Precision.


def test_factors_are_rounded_in_their_phase_alone():
    x = torch.full((2, 2), 1 + 2.0**-12)
    with precision.rounded({"factors": "tf32", "project": "bfloat16"}):
        outside, factors, project = (
            x @ x,
            phase("factors")(lambda: x @ x)(),
            phase("project")(lambda: (x + 2**-9) @ x)(),
        )
    assert torch.equal(outside, x @ x)
    assert torch.equal(factors, torch.full((2, 2), 2.0))
    assert torch.equal(project, torch.full((2, 2), 2.0))


def test_coarser_products_turn_updates_further():
    names = ("float32", "all tf32", "all bfloat16")
    rows = [precision.compare(one, "soap", CPU, ((24, 16),), 9) for one in precision.VARIANTS if one.name in names]
    fine, tf32, bfloat16 = (row["one step"] for row in rows)
    assert fine < 1e-3 < 10 * tf32
    assert fine < tf32 < bfloat16 < 5


def test_what_kl_leaves_off_the_diagonal_is_of_covariances():
    """Its state keeps them in their own basis; taken as they stand there they would seem to be turned by 0.8."""
    assert precision.compare(precision.VARIANTS[0], "kl", CPU, ((24, 16),), 9)["off the diagonal"] < 0.5


# Profiles.


def test_a_profile_adds_up():
    def event(name: str, start: float, end: float, on: Any = DeviceType.CUDA, mark: bool = False) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=on, is_user_annotation=mark, cpu_parent=None)

    step = gpu.profile.STEP
    events = [event(step, 0.0, 4000.0, DeviceType.CPU, True), event(step, 0.0, 9000.0, mark=True)]
    events += [event("gemm", 1000.0, 3000.0), event("gemm", 2000.0, 4000.0), event("Memcpy HtoD", 6000.0, 8000.0)]
    events += [event("Optimizer.step#Muon.step", 0.0, 9000.0), event("aten::mm", 0.0, 1.0, DeviceType.CPU)]
    found, kernels = gpu.profile.summary(events, DeviceType.CUDA)
    assert (found["ms"], found["host_ms"], found["busy_ms"]) == (8.0, 4.0, 5.0)
    assert found["busy_share"] == 5 / 8
    assert found["launches"] == 3
    assert kernels[0] == {"kernel": "gemm", "calls": 2, "ms": 4.0}
