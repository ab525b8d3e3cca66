"""Steps and goals of benchmarks/gpu.py: who is timed, for how long, and what goals are held against."""

from __future__ import annotations

import importlib
import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import gpu_goals
import gpu_job
import gpu_steps
import pytest
import torch
from gpu_script import CPU, Clock

from steepest.lab.bench import peers as bench_peers
from steepest.lab.bench.entrants import Family


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
    from steepest.lab.bench.measure import Measured

    entrant = SimpleNamespace(family=Family("soap", 4))
    over = f"{gpu_steps.OutOfTime.__name__}: the time"
    one = gpu_steps.whole_periods(Measured(entrant, wall=[1.0] * 7, cpu=[2.0] * 7, phases=[{}] * 7, error=over))
    assert (len(one.wall), len(one.cpu), len(one.phases), one.error) == (4, 4, 4, "")
    short = gpu_steps.whole_periods(Measured(entrant, wall=[1.0] * 3, error=over))
    assert (short.wall, short.error) == ([], over)
    failed = gpu_steps.whole_periods(Measured(entrant, wall=[1.0] * 7, error="no memory"))
    assert failed.error == "no memory"


def test_time_that_is_up_ends_a_plan(hasty):
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
