"""Steps on a GPU that isn't there: how much they launch and move, that nothing waits, and that nothing is misplaced."""

from __future__ import annotations

from functools import partial

import fed
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from steepest.cli import app
from steepest.engine.optimizer import Optimizer
from steepest.lab.bench.fake_gpu import GPU, count_steps, fake_gpu
from steepest.lab.bench.shapes import shape_set
from steepest.rules import RULES

GPT2 = shape_set("gpt2-124m")
HIDDEN = GPT2.matrices
VECTORS = [(768,)] * 86 + [(3072,)] * 12
STEADY = {"muon": (110, 130), "soap": (221, 163)}  # bytes an entry and launches, of all 48 matrices
PERIOD = 2


@pytest.mark.parametrize("rule", STEADY)
def test_a_steady_step_of_gpt2_moves_and_launches_this_much(rule):
    options = {"precondition_frequency": 10} if rule == "soap" else {}
    step = count_steps(partial(Optimizer, rule=rule, lr=1e-3, **options), HIDDEN, period=1).least
    most, launches = STEADY[rule]
    assert step.bytes <= most * GPT2.entries
    assert step.launches <= launches
    by_phase = step.by(lambda one: one.phase)
    assert by_phase["apply"].launches == 3 * 4  # decay, a mask and the move, for each of four shapes
    assert by_phase["apply"].bytes <= 20.1 * GPT2.entries


def test_vectors_take_one_fused_launch():
    step = count_steps(partial(Optimizer, rule="adamw", lr=1e-3), VECTORS, period=1).least
    by_name = step.by(lambda one: one.name)
    assert by_name["_fused_adamw_"].launches == 1
    assert step.launches <= 20


def training(name: str, steps: int, lost: int | None = None, **options: object):
    """What each step does to the GPU; after the step ``lost`` the host hears that all gradients were lost."""
    shapes = [(48, 32), (48, 32), (32, 64), (32,)]
    with fake_gpu() as gpu:
        params = [nn.Parameter(torch.empty(*shape, device=GPU)) for shape in shapes]
        optimizer = fed.optimizer(params, name, lr=0.1, **options)
        for k in range(steps):
            for p in params:
                p.grad = torch.empty_like(p)
            gpu.answer = int(k == lost)
            with gpu.counting() as counted:
                optimizer.step()
            yield counted


VARIANTS = {name: (name, {}) for name in RULES} | {
    "soap, warm-up": ("soap", {"adam_warmup_steps": 2}),
    "soap, staggered": ("soap", {"stagger": True}),
    "soap, async": ("soap", {"refresh_async": True}),
    "soap, 8 bits": ("soap", {"moment_dtype": "int8", "basis_dtype": "bfloat16"}),
    "soap, rounding": ("soap", {"stochastic_rounding": True}),
    "soap, l2": ("soap", {"weight_decay_method": "l2"}),
    "soap, cautious": ("soap", {"weight_decay_method": "cautious"}),
}
DECOMPOSE = ("_linalg_eigh", "_linalg_svd", "_linalg_check_errors")
"""What reports to the host whether it has converged, as CONTRIBUTING says of torch's decompositions."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_waits_and_nothing_is_misplaced(variant):
    """In the first step, between refreshes, in refreshes, in a warm-up, and after gradients that were lost."""
    rule, options = VARIANTS[variant]
    steps = PERIOD + 1
    if "precondition_frequency" in RULES[rule].defaults():
        steps, options = 2 * PERIOD, options | {"precondition_frequency": PERIOD}
    for step in training(rule, steps, lost=PERIOD - 1, **options):
        assert [wait for wait in step.waits if not wait.startswith(DECOMPOSE)] == []
        assert step.strays == []
        assert step.launches > 0


def test_a_wait_is_seen():
    """Skipping the refresh of single matrices asks the device which ones."""
    options = {"precondition_frequency": 1, "use_adaptive_criteria": True}
    _, second = training("soap", steps=2, **options)
    assert any(wait.startswith("index rules/parts/factors.py") for wait in second.waits)


@pytest.mark.parametrize("wait", [float, torch.Tensor.cpu, lambda x: x.to("cpu")], ids=["item", "cpu", "to"])
def test_every_kind_of_wait_is_seen(wait):
    with fake_gpu() as gpu:
        x = torch.ones((), device=GPU)
        with gpu.counting() as counted:
            wait(x)
    assert len(counted.waits) == 1


def test_a_stray_tensor_is_seen():
    with fake_gpu() as gpu:
        x, here = torch.ones(3, device=GPU), torch.ones(3)
        with gpu.counting() as counted, pytest.raises(RuntimeError):
            x + here
        assert counted.strays


def test_operations_count_once_and_by_list():
    with fake_gpu() as gpu:
        x = torch.ones(4, 4, device=GPU)
        with gpu.counting() as counted:
            x @ x.mT  # one tensor, twice
            x.mul_(2)
            x[1:3] = x[:2]
            torch._foreach_mul_([x, x], 2)
            torch._foreach_add_([x, x], [x, x.mT])  # in other layouts: one by one
    names = [(one.name, one.launches, one.bytes) for one in counted.operations]
    assert names == [
        ("mm", 1, 128),
        ("mul_", 1, 64),
        ("copy_", 1, 64),
        ("_foreach_mul_", 1, 64),
        ("_foreach_add_", 2, 64),
    ]
    assert counted.flops == 2 * 4**3


def test_the_command_prints_counts():
    for more in ([], ["--lines"]):
        result = CliRunner().invoke(app, ["bench", "--count", "--optimizers", "muon, adamw", *more])
        assert result.exit_code == 0, result.output
        assert "launches" in result.output
        assert ("rules/muon.py" if more else "orthogonalize") in result.output.replace("\n", "")


def test_lines_need_count():
    result = CliRunner().invoke(app, ["bench", "--lines"])
    assert result.exit_code != 0
    assert "--lines" in result.output
