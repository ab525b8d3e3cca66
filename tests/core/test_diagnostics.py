"""Diagnostics: they are true, of every rule, and cost nothing where nobody asks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import steepest
from steepest.engine.diagnostics.factors import factor_health
from steepest.engine.phases import Timeline, listening
from steepest.optimizers import NAMES

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("soap", {"moment_dtype": "int8", "basis_dtype": "bfloat16"}),
    ("soap", {"stagger": True, "basis_timing": "after"}),
    ("kl-soap", {"block_size": 5}),
    ("muon", {"weight_decay": 0.1, "elementwise": {"amsgrad": True, "betas": (0.9, 0.3)}}),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.up, self.down = nn.Linear(24, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(self.up(self.qkv(self.embed(x))).tanh()))
        return out


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randint(0, 9, (16,))
        logits = model(x)
        if hasattr(optimizer, "sample"):
            optimizer.sample(logits, "categorical")
        nn.functional.cross_entropy(logits, x % 3).backward()
        optimizer.step()


def trained(name: str, steps: int = 4, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = steepest.for_model(model, name, **{"lr": 0.01, "weight_decay": 0.0} | options)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_the_latest_step_is_told_by_rule_and_parameter(name: str, options: dict[str, Any]) -> None:
    model, optimizer = trained(name, **options)
    optimizer.diagnostics()
    train(model, optimizer, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    told = optimizer.diagnostics(per_parameter=True)
    assert all(type(x) is float and math.isfinite(x) for x in told.values())
    sums: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        decay = 1 - group["lr"] * group["weight_decay"]
        for key, p in zip(group["param_names"], group["params"], strict=True):
            lr_D = (before[key] * decay - p).detach()
            ratio, rms = lr_D.norm() / p.detach().norm(), lr_D.square().mean().sqrt() / group["lr"]
            prefix = f"{group['rule']}/{key}"
            assert told[f"{prefix}/update_rms"] == pytest.approx(rms.item(), rel=1e-3, abs=1e-5)
            assert told[f"{prefix}/update_to_weight"] == pytest.approx(ratio.item(), rel=1e-3, abs=1e-6)
            one = torch.stack([lr_D.square().sum() / group["lr"] ** 2, torch.tensor(float(p.numel()))])
            sums[group["rule"]] = sums.get(group["rule"], torch.zeros(2)) + one
    for rule, (squares, entries) in sums.items():
        assert told[f"{rule}/update_rms"] == pytest.approx((squares / entries).sqrt().item(), rel=1e-3)
    assert optimizer.diagnostics().items() <= told.items()


def test_updates_are_told_from_a_momentum_in_8_bits() -> None:
    """Lion moves every entry by the rate. A few small entries of its momentum are rounded to zero afterwards."""
    _, optimizer = trained("lion", moment_dtype="int8")
    assert 0.97 < optimizer.diagnostics()["lion/update_rms"] <= 1.0


class Counter(TorchDispatchMode):
    """The operations that are done, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["soap", "muon", "lion"])
def test_steps_only_copy_and_calls_wait_once(name: str) -> None:
    copying = "aten._foreach_mul.Scalar"
    steps, calls = {}, Counter()
    for asks in (False, True):
        model, optimizer = trained(name)
        counter = Counter()
        for _ in range(3):
            if asks:
                with calls:
                    optimizer.diagnostics()
            torch.manual_seed(1)
            train_one = torch.randint(0, 9, (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_one), train_one % 3).backward()
            with counter:
                optimizer.step()
        steps[asks] = counter.seen
        assert asks or optimizer._watch is None
    assert copying not in steps[False] != []
    assert [op for op in steps[True] if op != copying] == steps[False]
    assert steps[True].count(copying) == (0 if name == "lion" else 3 * len(optimizer._roster.buckets))
    assert "aten._local_scalar_dense.default" not in calls.seen
    assert calls.seen.count("aten.cat.default") == 3  # one reading a call


def test_factors_are_told_as_eigenvalues_tell_them() -> None:
    torch.manual_seed(0)
    K = torch.randn(3, 6, 9, dtype=torch.float64)
    K = K @ K.mT
    Q = torch.linalg.qr(torch.linalg.eigh(K).eigenvectors + 0.05 * torch.randn_like(K))[0]
    found = factor_health({"L": K, "Q_L": Q}, "L")
    rotated = Q.mT @ K @ Q
    λ = rotated.diagonal(dim1=-2, dim2=-1)
    off = rotated - torch.diag_embed(λ)
    true = torch.linalg.eigvalsh(K)
    torch.testing.assert_close(found["basis_drift"], off.norm(dim=(-2, -1)) / K.norm(dim=(-2, -1)))
    torch.testing.assert_close(found["condition_number"], λ.amax(-1) / λ.amin(-1))
    torch.testing.assert_close(found["effective_rank"], true.sum(-1) ** 2 / true.square().sum(-1) / 6)
    in_basis = factor_health({"L": rotated, "Q_L": Q, "in_basis": torch.ones(3)}, "L")
    for what, x in found.items():
        torch.testing.assert_close(in_basis[what], x)
    P = torch.linalg.inv(K)
    by_roots = factor_health({"A": K, "P_A": P}, "A")["condition_number"]
    torch.testing.assert_close(by_roots, true[:, -1] / true[:, 0], rtol=0.1, atol=0.0)
    roots = torch.linalg.eigh(K)
    P = roots.eigenvectors * roots.eigenvalues.pow(-0.5).unsqueeze(-2) @ roots.eigenvectors.mT
    by_roots = factor_health({"A": K, "P_A": P}, "A", torch.full((3,), 2))["condition_number"]
    torch.testing.assert_close(by_roots, true[:, -1] / true[:, 0], rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    "options", [{"precondition_frequency": 3}, {"basis_timing": "after"}, {"adam_warmup_steps": 2}]
)
def test_ages_are_the_steps_since_bases_have_turned(options: dict[str, Any]) -> None:
    W = nn.Parameter(torch.randn(5, 4))
    optimizer, age = steepest.SOAP([("w", W)], lr=0.01, **options), math.nan
    for _ in range(9):
        before = optimizer.state[W]["Q_L"].clone()
        W.grad = torch.randn(5, 4)
        optimizer.step()
        age = age + 1 if torch.equal(before, optimizer.state[W]["Q_L"]) else 0
        told = optimizer.diagnostics(per_parameter=True)
        assert told.get("soap/w/refresh_age", math.nan) == pytest.approx(age, nan_ok=True)


def test_what_was_skipped_and_failed_is_told() -> None:
    W, V, b = (nn.Parameter(torch.ones(*shape)) for shape in ((4, 4), (4, 4), (3,)))
    groups = [{"params": [("w", W), ("v", V)], "rule": "soap"}, {"params": [("b", b)], "rule": "adamw"}]
    optimizer = steepest.Optimizer(groups, lr=0.1)
    optimizer.diagnostics()
    for _ in range(2):
        W.grad, V.grad, b.grad = torch.full((4, 4), torch.nan), torch.randn(4, 4), torch.full((3,), torch.inf)
        optimizer.step()
    optimizer._stacks[0].failures[1] += 3
    told = optimizer.diagnostics(per_parameter=True)
    assert (told["optimizer/skipped"], optimizer.skipped) == (4.0, 4)
    assert told["optimizer/failed_decompositions"] == told["soap/v/failed_decompositions"] == 3.0
    assert "soap/w/update_rms" not in told
    assert "adamw/b/update_rms" not in told
    assert told["soap/v/update_rms"] > 0
    assert "soap/w/condition_number" not in told


def test_copies_and_new_groups_go_on() -> None:
    model, optimizer = trained("soap")
    optimizer.diagnostics(times=True)
    train(model, optimizer, 1)
    told = optimizer.diagnostics()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._watch is None
        assert other.diagnostics()["soap/condition_number"] == told["soap/condition_number"]
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("extra", extra)], "rule": "adamw"})
    assert optimizer.diagnostics()["soap/update_rms"] == told["soap/update_rms"]
    extra.grad = torch.ones(3)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.randn(24, 8))  # laid out anew at the next step
    optimizer.step()
    assert "soap/update_rms" in optimizer.diagnostics()


def test_phases_are_timed_from_the_first_question_on() -> None:
    model, optimizer = trained("soap")
    assert not any(key.startswith("time/") for key in optimizer.diagnostics(times=True))
    train(model, optimizer, 1)
    told = optimizer.diagnostics()
    assert {"time/rest", "time/gather", "time/project", "time/apply"} <= told.keys()
    assert all(x >= 0 for key, x in told.items() if key.startswith("time/"))
    with listening(Timeline(lambda: 0)):  # somebody else's
        train(model, optimizer, 1)
    assert "time/rest" not in optimizer.diagnostics()
