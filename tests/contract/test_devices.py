"""On accelerators a step must not wait for values: bad gradients are masked, and their effects undone on the device.

That path is taken here on the CPU, where its results can be compared with those of the path that asks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import fed
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from steepest.linalg import attempts
from steepest.rules import RULES
from steepest.rules.parts import factors
from steepest.stack.stack import AsyncCopy
from steepest.testing import check_optimizer
from steepest.testing.evidence import Snapshot, expect_same, snapshot
from steepest.testing.run import Run
from steepest.testing.subject import Subject

SOAP: dict[str, dict[str, Any]] = {
    "soap f=3": {"precondition_frequency": 3},
    "soap stagger": {"precondition_frequency": 3, "stagger": True},
    "soap kl": {"use_kl_shampoo": True, "solver": "eigh"},
    "soap after": {"basis_timing": "after"},
    "soap warmup": {"adam_warmup_steps": 2},
    "soap l2": {"weight_decay_method": "l2", "nesterov": True},
    "soap batches": {"merge_dims": False, "max_update_rms": 0.5},
}
IN_8_BITS = {f"{rule} in 8 bits": rule for rule in ("dion", "lion", "adamw")}
ADAPTIVE = {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.1}

POISON = {
    0: {"first.weight": math.nan},
    2: {"bias": math.inf},
    3: {"second.weight": math.inf, "kernel": -math.inf},
    5: dict.fromkeys(["first.weight", "second.weight", "kernel", "bias", "gain"], math.nan),
}
MISSING = {2: ["first.weight"], 3: ["gain"], 4: ["second.weight"]}


def build(params: Any, name: str, **options: Any) -> steepest.Optimizer:
    rule, own = (name, {}) if name in RULES else ("soap", SOAP.get(name, ADAPTIVE))
    if name in IN_8_BITS:
        rule, own = IN_8_BITS[name], {"moment_dtype": "int8"}
    at_each = {"precondition_frequency": 1} if rule == "soap" else {}
    return fed.optimizer(params, rule, **{"lr": 0.1} | at_each | own | options)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)


def train(name: str, dtype: torch.dtype = torch.float32, steps: int = 8, **options: Any) -> tuple[Run, list[Snapshot]]:
    """Train with bad and missing gradients; return the run, and weights and state after each step."""
    run = Subject(functools.partial(build, name=name), dtype).start(**options)
    seen = []
    for k in range(steps):
        run.step(k, missing=MISSING.get(k, []), poison=POISON.get(k))
        seen.append(snapshot({"weights": run.weights(), "state": run.optimizer.state_dict()["state"]}))
    return run, seen


@pytest.mark.parametrize("name", [*RULES, *SOAP, *IN_8_BITS, "soap adaptive"])
def test_masking_is_the_same_to_the_last_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, steps = train(name)
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)
    run, masked_steps = train(name)
    for k, (seen, wanted) in enumerate(zip(masked_steps, steps, strict=True)):
        expect_same(seen, wanted, f"the same after step {k}")
    assert run.optimizer.skipped == expected.optimizer.skipped == 9  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["soap", "adamw", "muon"])
@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.1)}, {"weight_decay": 0.0}], ids=["tensor lr", "no decay"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_whatever_the_weights_are(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, steps = train(name, dtype, steps=4, **options)
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)
    _, masked_steps = train(name, dtype, steps=4, **options)
    expect_same(masked_steps[-1], steps[-1], "the same training")


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("name", ["soap f=3", "adamw", "shampoo"])
def test_masking_keeps_the_contract(name: str) -> None:
    clauses = ["bad_gradient_isolated", "bad_gradient_resumes", "overflow", "resume_float32", "resume_deepcopy"]
    report = check_optimizer(functools.partial(build, name=name), only=[*clauses, "missing_leaves_state", "idle_step"])
    assert report.ok, report


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("name", [*RULES, *SOAP, *IN_8_BITS])
def test_no_value_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for a result, except with options that say so. (Clocks are on the host.)"""
    monkeypatch.setattr(factors, "answers", lambda G: False)
    run = Subject(functools.partial(build, name=name)).start()
    for k in range(4):
        run.set_gradients(k, missing=MISSING.get(k, []))
        with Questions() as questions:
            run.optimizer.step()
        assert not questions.asked


@pytest.mark.usefixtures("masked")
def test_a_question_is_noticed() -> None:
    """Skipping the refresh of single matrices waits for the device, as its documentation says."""
    run = Subject(functools.partial(build, name="soap adaptive")).start()
    run.step(0)
    with Questions() as questions:
        run.step(1)
    assert questions.asked


class Questions(TorchDispatchMode):
    """Notes every operation whose result depends on values that the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = any(name in str(op) for name in ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal"))
        if str(op).startswith(("aten.index.", "aten.index_put")):
            waits = any(x is not None and x.dtype == torch.bool for x in args[1])
        of_the_host = isinstance(args[0], Tensor) and args[0].dtype == torch.int64 if args else False
        if waits and not (of_the_host and "scalar" in str(op)):
            self.asked.append(str(op))
        return op(*args, **kwargs or {})


@pytest.mark.usefixtures("masked")
def test_a_save_after_a_bad_gradient_has_the_right_clock() -> None:
    """The host learns a step late that an update was undone, but a state saved before that has the right clock."""
    W = nn.Parameter(torch.ones(2, 3))
    optimizer = steepest.SOAP([W], lr=0.1)
    for grad in (torch.eye(2, 3), torch.full((2, 3), math.nan)):
        W.grad = grad
        optimizer.step()
    assert optimizer.state_dict()["state"][0]["clock"] == 1
    W.grad = torch.full((2, 3), math.nan)
    optimizer.step()
    assert optimizer.__getstate__()["state"][W]["clock"] == 1
    saved = optimizer.state_dict()
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"][0]["clock"] == 1
    assert optimizer.skipped == 3


def test_an_async_copy_is_a_copy() -> None:
    x = torch.tensor([1, 2])
    copied = AsyncCopy(x)
    x.zero_()
    assert copied.wait().tolist() == [1, 2]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("name", [*RULES, *SOAP, *IN_8_BITS])
def test_the_contract_on_a_gpu(name: str) -> None:
    report = check_optimizer(functools.partial(build, name=name), device="cuda")
    assert report.ok, report


@needs_cuda
@pytest.mark.parametrize("name", [name for name in [*RULES, *SOAP] if name not in ("soap kl", "inverse_root")])
def test_a_step_on_a_gpu_does_not_wait(name: str) -> None:
    """No step waits on a GPU, except for full decompositions, which report errors to the host."""
    run = Subject(functools.partial(build, name=name), device="cuda").start()
    run.steps(range(3))
    run.set_gradients(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
