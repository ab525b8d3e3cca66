"""SOAP's fast paths against what they stand for: solvers of a refresh, and KL's quotients kept from step to step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steepest
from steepest.factors import Factors
from steepest.linalg import solvers
from steepest.linalg.eigenbasis import conjugate
from steepest.rule import State, Step
from steepest.rules.shampoo import Shampoo
from steepest.rules.soap import Soap

SHAPES = [(5, 5), (9, 4), (4, 9)]
KL: dict[str, dict[str, Any]] = {
    "f3": {"precondition_frequency": 3},
    "f3 absolute floor": {"precondition_frequency": 3, "kl_floor": 0.0, "eps": 1e-3},
    "f3 after": {"precondition_frequency": 3, "basis_timing": "after"},
    "f3 warmup": {"precondition_frequency": 3, "adam_warmup_steps": 4},
    "f3 one-sided": {"precondition_frequency": 3, "max_precond_dim": 8},
    "f3 eigh": {"precondition_frequency": 3, "refresh": "eigh"},
    "f3 uncorrected": {"precondition_frequency": 3, "correct_bias": False},
}


def stepped(rule: Any, state: State, k: int, G: torch.Tensor, phases: tuple[int, ...], penalty: bool) -> Any:
    due = [i for i, phase in enumerate(phases) if rule.due(k, phase)]
    t = torch.full((len(G), 1, 1), k + 1.0, dtype=G.dtype)
    return rule.update(
        G, state, Step(t, rule.stage(k), torch.tensor(due) if due else None, 0.1 * G if penalty else None)
    )


def twins(
    rule: Any, shape: tuple[int, int], dtype: torch.dtype, phases: tuple[int, ...], penalty: bool = False
) -> tuple[float, float]:
    """How far directions and factors of the fast and the literal path ever are from each other, relatively."""
    fast = rule.init(torch.empty(len(phases), *shape, dtype=dtype))
    literal = {name: x.clone() for name, x in fast.items() if not name.startswith("lambda")}
    assert Factors(fast).quotients is not None
    assert Factors(literal).quotients is None
    apart = [0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(shape[0], shape[0], generator=generator, dtype=dtype)
    for k in range(50):
        G = mixing @ torch.randn(len(phases), *shape, generator=generator, dtype=dtype)
        ours, theirs = (stepped(rule, state, k, G, phases, penalty) for state in (fast, literal))
        if ours is not None:
            apart[0] = max(apart[0], float(torch.dist(ours, theirs) / theirs.norm()))
        for side in fast.keys() & {"L", "R"}:
            K, Q = fast[side], fast[f"Q_{side}"]
            apart[1] = max(apart[1], float(torch.dist(K, literal[side]) / K.norm()))
            exact = conjugate(K, Q, diag=True)
            apart[1] = max(apart[1], float(torch.dist(fast[f"lambda_{side}"], exact) / exact.norm()))
    return apart[0], apart[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KL)
def test_kl_by_kept_quotients_is_the_literal_feed(name: str, shape: tuple[int, int]) -> None:
    """Two matrices that refresh at different steps; in float64, so that nothing but the formula is compared."""
    directions, factors = twins(Soap(use_kl_shampoo=True, **KL[name]), shape, torch.float64, phases=(0, 1))
    assert directions < 1e-8  # Adam divides by small numbers, and rounding with them
    assert factors < 1e-10


@pytest.mark.parametrize("penalty", [False, True])
def test_weight_decay_as_a_gradient_is_projected_too(penalty: bool) -> None:
    rule = Soap(use_kl_shampoo=True, precondition_frequency=3)
    directions, factors = twins(rule, (6, 4), torch.float64, (0, 0), penalty)
    assert directions < 1e-8
    assert factors < 1e-10


def test_kl_in_float32_is_the_literal_feed_but_for_rounding() -> None:
    _, factors = twins(Soap(use_kl_shampoo=True, precondition_frequency=5), (6, 6), torch.float32, (0,))
    assert 0 < factors < 1e-4


def test_a_quotient_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Factors, "measure", lambda self: None)
    _, factors = twins(Soap(use_kl_shampoo=True, precondition_frequency=3), (5, 5), torch.float64, (0,))
    assert factors > 1e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_shampoo_keeps_its_eigenvalues_by_the_feed(shape: tuple[int, int]) -> None:
    rule = Shampoo(use_kl_shampoo=True, exponent=-0.5, precondition_frequency=3)
    state = rule.init(torch.empty(1, *shape, dtype=torch.float64))
    for k in range(20):
        G = torch.randn(1, *shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        stepped(rule, state, k, G, (0,), penalty=False)
        for side in ("L", "R"):
            exact = conjugate(state[side], state[f"Q_{side}"], diag=True)
            torch.testing.assert_close(state[f"lambda_{side}"], exact, rtol=1e-10, atol=1e-12)


def test_bases_that_turn_at_each_step_leave_nothing_to_keep() -> None:
    assert "lambda_L" not in Soap(use_kl_shampoo=True).init(torch.empty(1, 2, 3))
    assert "lambda_L" not in Soap(precondition_frequency=2).init(torch.empty(1, 2, 3))
    for every in (2, lambda step: 1):
        assert "lambda_L" in Soap(use_kl_shampoo=True, precondition_frequency=every).init(torch.empty(1, 2, 3))


def test_kl_may_be_switched_on_in_training() -> None:
    """There are no quotients then; the literal feed does without."""
    W = torch.nn.Parameter(torch.zeros(4, 4))
    opt = steepest.SOAP([W], lr=0.1, precondition_frequency=1)
    for k in range(4):
        opt.param_groups[0]["use_kl_shampoo"] = k >= 2
        W.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(k))
        opt.step()
    assert torch.isfinite(W).all()


@pytest.mark.parametrize("refresh", ["cholesky", "first_order"])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_that_of_householder(refresh: str, every: int) -> None:
    """A least squares problem: "cholesky" trains as "qr" does but for rounding, "first_order" as well."""
    losses = {}
    A = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 24)
    target = torch.randn(24, 12, generator=torch.Generator().manual_seed(2))
    for name in ("qr", refresh):
        W = torch.nn.Parameter(torch.zeros(24, 12))
        opt = steepest.SOAP([W], lr=0.03, weight_decay=0.0, refresh=name, precondition_frequency=every)
        for _ in range(60):
            opt.zero_grad()
            loss = (A @ (W - target)).square().mean()
            loss.backward()
            opt.step()
        losses[name] = loss.item()
    assert losses[refresh] == pytest.approx(losses["qr"], rel=0.3)


@pytest.mark.parametrize("refresh", ["auto", *solvers.SOLVERS])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_solver_is_the_one_that_was_asked_for(refresh: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name, solver in list(solvers.SOLVERS.items()):
        spy = lambda *args, name=name, solver=solver: called.append(name) or solver(*args)  # noqa: E731
        monkeypatch.setitem(solvers.SOLVERS, name, spy)
    choice = solvers.choose(device)
    monkeypatch.setattr(solvers, "choose", lambda here: choice)
    W = torch.nn.Parameter(torch.zeros(8, 4))
    opt = steepest.SOAP([W], lr=0.1, precondition_frequency=1, refresh=refresh)
    for k in range(3):
        W.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        opt.step()
    expected = {("auto", "cpu"): "qr", ("auto", "cuda"): "first_order"}.get((refresh, device), refresh)
    assert called == [expected] * (6 if refresh == "qr" else 4)  # others start with a full decomposition


def kl(frequency: int, steps: int) -> tuple[torch.nn.Parameter, steepest.SOAP]:
    """KL-SOAP after some steps on made gradients."""
    W = torch.nn.Parameter(torch.zeros(6, 10))
    optimizer = steepest.SOAP([W], lr=0.1, use_kl_shampoo=True, precondition_frequency=frequency)
    for step in range(steps):
        W.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return W, optimizer


def test_a_checkpoint_without_quotients_gets_them() -> None:
    _, optimizer = kl(3, 8)
    saved = optimizer.state_dict()
    kept = {side: saved["state"][0].pop(f"lambda_{side}") for side in ("L", "R")}
    V, again = kl(3, 0)
    again.load_state_dict(saved)
    for side, λ in kept.items():
        assert again.state[V][f"lambda_{side}"].abs().sum() > 0
        torch.testing.assert_close(again.state[V][f"lambda_{side}"], λ, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_a_frequency_changed_in_training_can_be_saved_and_loaded(before: int, after: int) -> None:
    _, optimizer = kl(before, 5)
    optimizer.param_groups[0]["precondition_frequency"] = after
    saved = optimizer.state_dict()
    for built in (before, after):
        V, again = kl(built, 0)
        again.load_state_dict(saved)
        assert again.param_groups[0]["precondition_frequency"] == after
        assert ("lambda_L" in again.state[V]) == (built != 1)
        assert torch.equal(again.state[V]["L"], optimizer.state_dict()["state"][0]["L"])
        V.grad = torch.ones(6, 10)
        again.step()
        assert torch.isfinite(V).all()
