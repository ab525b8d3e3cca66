"""SOAP's fast paths agree with plain formulas: the solvers of a refresh, and KL's factors in their eigenbases."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import steepest
from steepest.linalg import solvers
from steepest.linalg.eigenbasis import conjugate
from steepest.linalg.turning import Turn, decomposed
from steepest.rule import State, Step
from steepest.rules.kl_shampoo import KLShampoo
from steepest.rules.kl_soap import KLSoap
from steepest.rules.parts import factors as plain_factors
from steepest.rules.parts import kl_factors
from steepest.rules.parts.factors import SIDES, Factors
from steepest.rules.parts.kl_factors import KLFactors
from steepest.rules.soap import AdamInBasis

SHAPES = [(5, 5), (9, 4), (4, 9)]
KL: dict[str, dict[str, Any]] = {
    "f1": {},
    "f3": {"precondition_frequency": 3},
    "f3 absolute floor": {"precondition_frequency": 3, "kl_floor": 0.0, "eps": 1e-3},
    "f1 after": {"basis_timing": "after"},
    "f3 after": {"precondition_frequency": 3, "basis_timing": "after"},
    "f3 warmup": {"precondition_frequency": 3, "adam_warmup_steps": 4},
    "f3 after warmup": {"precondition_frequency": 3, "adam_warmup_steps": 4, "basis_timing": "after"},
    "f3 one-sided": {"precondition_frequency": 3, "max_precond_dim": 8},
    "f3 qr": {"precondition_frequency": 3, "solver": "qr"},
    "f3 qr twice": {"precondition_frequency": 3, "power_iter_steps": 2},
    "f3 cholesky": {"precondition_frequency": 3, "solver": "cholesky"},
    "f3 cholesky twice": {"precondition_frequency": 3, "solver": "cholesky", "power_iter_steps": 2},
    "f3 first order": {"precondition_frequency": 3, "solver": "first_order"},
    "f3 eigh": {"precondition_frequency": 3, "solver": "eigh"},
    "f3 eigh by rank": {"precondition_frequency": 3, "solver": "eigh", "match_columns": False},
    "f3 adaptive": {
        "precondition_frequency": 3,
        "use_adaptive_criteria": True,
        "adaptive_update_tolerance": 0.02,
    },
    "f3 uncorrected": {"precondition_frequency": 3, "correct_bias": False},
    "f3 nesterov": {"precondition_frequency": 3, "nesterov": True},
}


@dataclass(frozen=True, kw_only=True)
class Literal(AdamInBasis[Factors]):
    """KL-SOAP by the formula as it stands: factors in the gradients' coordinates, whitened by explicit inverses."""

    kl_floor: float = 1e-4

    def factors(self, state: State, step: Step) -> Factors:
        return Factors(state, step.failures)

    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        whitened = {}
        for side, _ in SIDES:
            if side in factors.state:
                Q, λ = factors.state[f"Q_{side}"], conjugate(factors.state[side], factors.state[f"Q_{side}"], diag=True)
                λ = λ.clamp(min=self.eps) if self.kl_floor == 0 else torch.maximum(λ, self.kl_floor * λ.amax(-1, True))
                whitened[side] = Q @ torch.diag_embed(1 / λ) @ Q.mT
        beta = self.factor_beta(step)
        for side, other, X in (("L", "R", G), ("R", "L", G.mT)):
            if side in factors.state:
                Y = X @ whitened[other] if other in whitened else X
                factors.state[side].mul_(beta).add_((1 - beta) * Y @ X.mT / X.shape[-1])


def stepped(rule: Any, state: State, k: int, G: Tensor, phases: tuple[float, ...], penalty: bool) -> Any:
    due = [i for i, phase in enumerate(phases) if rule.due(k, phase)]
    t = torch.full((len(G), 1, 1), k + 2.0, dtype=G.dtype)  # so that what the factors start with counts
    step = Step(t, rule.stage(k), torch.tensor(due) if due else None, 0.1 * G if penalty else None)
    D = rule.update(G, state, step)
    if rule.defers(step):
        rule.finish(state, step)
    return D


def relative(x: Tensor, y: Tensor) -> float:
    return float(torch.dist(x, y) / y.norm())


def twins(
    rule: KLSoap, shape: tuple[int, int], dtype: torch.dtype, phases: tuple[float, ...], penalty: bool = False
) -> tuple[float, float]:
    """The largest relative distance of directions and covariances from those of the formula.

    Factors start at something of full rank: how a null space is spanned, rounding decides.
    """
    G = torch.empty(len(phases), *shape, dtype=dtype)
    formula = Literal(**{f.name: getattr(rule, f.name) for f in fields(rule)})
    fast, literal = rule.init(G), formula.init(G)
    assert fast.keys() - literal.keys() == {"in_basis"}
    apart = [0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(shape[0], shape[0], generator=generator, dtype=dtype)
    for side in literal.keys() & {"L", "R"}:
        A = torch.randn(literal[side].shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        for state in (fast, literal):
            state[side].copy_(A @ A.mT)
    for k in range(50):
        G = mixing @ torch.randn(len(phases), *shape, generator=generator, dtype=dtype)
        ours, theirs = (stepped(r, s, k, G, phases, penalty) for r, s in ((rule, fast), (formula, literal)))
        if ours is not None:
            apart[0] = max(apart[0], relative(ours, theirs))
        for side in fast.keys() & {"L", "R"}:
            apart[1] = max(apart[1], relative(KLFactors(fast).covariance(side), literal[side]))
    return apart[0], apart[1]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=() if i % len(SHAPES) == j else pytest.mark.slow, id=f"{name}-{shape}")
        for i, name in enumerate(KL)
        for j, shape in enumerate(SHAPES)
    ],
)
def test_kl_in_the_eigenbases_is_the_formula(name: str, shape: tuple[int, int]) -> None:
    """Two matrices that refresh at different steps; in float64, so that nothing but the formula is compared."""
    directions, factors = twins(KLSoap(**KL[name]), shape, torch.float64, phases=(0, 1 / 3))
    assert directions < 1e-7  # Adam divides by small numbers, and rounding with them
    assert factors < 1e-10


@pytest.mark.parametrize("options", [{}, {"precondition_frequency": 3, "refresh_async": True}], ids=str)
@pytest.mark.parametrize("penalty", [False, True])
def test_so_it_is_with_weight_decay_as_a_gradient_and_refreshes_after_the_step(
    options: dict[str, Any], penalty: bool
) -> None:
    directions, factors = twins(KLSoap(**options), (6, 4), torch.float64, (0, 0), penalty)
    assert directions < 1e-7
    assert factors < 1e-10


def test_so_it_is_for_vectors() -> None:
    rule = KLSoap(precondition_frequency=3, precondition_1d=True)
    directions, factors = twins(rule, (1, 6), torch.float64, (0, 1 / 3))
    assert directions < 1e-7
    assert factors < 1e-10


def test_in_float32_it_is_but_for_rounding() -> None:
    _, factors = twins(KLSoap(precondition_frequency=5), (6, 6), torch.float32, (0,))
    assert 0 < factors < 1e-4


def test_a_factor_that_does_not_turn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(K: Tensor, solver: str, steps: int) -> Turn:
        return turn(K, solver, steps)._replace(K=K)

    turn = kl_factors.turn
    monkeypatch.setattr(kl_factors, "turn", forgetful)
    _, factors = twins(KLSoap(precondition_frequency=3), (5, 5), torch.float64, (0,))
    assert factors > 1e-3


@pytest.mark.parametrize(
    ("solver", "basis_dtype", "turns"),
    [
        *(("qr", "bfloat16", 500), ("first_order", "float32", 500)),
        *(
            pytest.param(*case, 2000, marks=pytest.mark.slow)
            for case in product(("qr", "first_order"), ("float32", "bfloat16"))
        ),
    ],
)
def test_bases_and_factors_stay_what_they_are(solver: str, basis_dtype: str, turns: int) -> None:
    """Every turn is a product, with its rounding. Bases in bfloat16 lose 8 bits each time, and are made orthogonal."""
    W = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = steepest.SOAP([W], lr=0.0, use_kl_shampoo=True, solver=solver, basis_dtype=basis_dtype)
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    for k in range(turns):
        W.grad = mixing @ torch.randn(24, 16, generator=torch.Generator().manual_seed(k))
        optimizer.step()
    state = optimizer.state[W]
    for side in "LR":
        Q, K = state[f"Q_{side}"].float(), state[side]
        assert (Q.T @ Q - torch.eye(len(Q))).abs().max() < (1e-5 if basis_dtype == "float32" else 1e-2)
        assert torch.dist(K, K.T) < 1e-6 * K.norm()
        assert torch.linalg.eigvalsh(K.double()).min() > 0


def test_a_failed_decomposition_leaves_everything_of_its_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(K: Tensor, solver: str, steps: int) -> Turn:
        U, order, K = decomposed(K)
        lost = torch.tensor([True, False]).view(2, 1, 1)
        return Turn(U.masked_fill(lost, torch.nan), order, K.masked_fill(lost, torch.nan))

    monkeypatch.setattr(kl_factors, "turn", failing)
    rule = KLSoap()
    state = rule.init(torch.empty(2, 4, 3))
    factors = KLFactors(state, torch.zeros(2, dtype=torch.int64))
    factors.accumulate(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), 0.5)
    state["exp_avg"] += torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    before = {name: x.clone() for name, x in state.items()}
    factors.refresh(slice(None))
    assert factors.failures.tolist() == [2, 0]
    for name in ("L", "R", "Q_L", "Q_R", "exp_avg"):
        assert torch.equal(state[name][0], before[name][0])
        assert not torch.equal(state[name][1], before[name][1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_shampoo_keeps_its_eigenvalues_by_the_feed(shape: tuple[int, int]) -> None:
    rule = KLShampoo(precondition_frequency=3)
    state = rule.init(torch.empty(1, *shape, dtype=torch.float64))
    for k in range(20):
        G = torch.randn(1, *shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        stepped(rule, state, k, G, (0,), penalty=False)
        for side in ("L", "R"):
            exact = conjugate(state[side], state[f"Q_{side}"], diag=True)
            torch.testing.assert_close(state[f"lambda_{side}"], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["cholesky", "first_order"])
@pytest.mark.parametrize("every", [1, 3])
def test_training_is_that_of_householder(solver: str, every: int) -> None:
    """A least squares problem: "cholesky" trains as "qr" does but for rounding, "first_order" as well."""
    losses = {}
    A = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, 24)
    target = torch.randn(24, 12, generator=torch.Generator().manual_seed(2))
    for name in ("qr", solver):
        W = torch.nn.Parameter(torch.zeros(24, 12))
        opt = steepest.SOAP([W], lr=0.03, weight_decay=0.0, solver=name, precondition_frequency=every)
        for _ in range(60):
            opt.zero_grad()
            loss = (A @ (W - target)).square().mean()
            loss.backward()
            opt.step()
        losses[name] = loss.item()
    assert losses[solver] == pytest.approx(losses["qr"], rel=0.3)


@pytest.mark.parametrize("solver", ["auto", *solvers.SOLVERS])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kl", [False, True])
def test_the_solver_is_the_one_that_was_asked_for(
    kl: bool, solver: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name, solve in list(solvers.SOLVERS.items()):
        spy = lambda *args, name=name, solve=solve: called.append(name) or solve(*args)  # noqa: E731
        monkeypatch.setitem(solvers.SOLVERS, name, spy)
    choice = solvers.choose(device)
    monkeypatch.setattr(plain_factors, "choose", lambda here: choice)
    monkeypatch.setattr(kl_factors, "choose", lambda here: choice)
    turn = kl_factors.turn
    monkeypatch.setattr(kl_factors, "turn", lambda K, name, steps: called.append(name) or turn(K, name, steps))
    W = torch.nn.Parameter(torch.zeros(8, 4))
    opt = steepest.SOAP([W], lr=0.1, precondition_frequency=1, solver=solver, use_kl_shampoo=kl)
    for k in range(3):
        W.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(k))
        opt.step()
    expected = {("auto", "cpu"): "qr", ("auto", "cuda"): "first_order"}.get((solver, device), solver)
    assert called == [expected] * (6 if solver == "qr" else 4)  # others start with a full decomposition


def kl(frequency: int, steps: int) -> tuple[torch.nn.Parameter, steepest.SOAP]:
    """KL-SOAP after some steps on made gradients."""
    W = torch.nn.Parameter(torch.zeros(6, 10))
    optimizer = steepest.SOAP([W], lr=0.1, use_kl_shampoo=True, precondition_frequency=frequency)
    for step in range(steps):
        W.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return W, optimizer


def test_covariances_in_other_coordinates_are_not_loaded() -> None:
    _, optimizer = kl(3, 8)
    saved = optimizer.state_dict()
    del saved["state"][0]["in_basis"]
    V, again = kl(3, 0)
    with pytest.raises(ValueError, match="the saved state has no 'in_basis'"):
        again.load_state_dict(saved)
    assert not again.state[V]["L"].any()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3)])
def test_a_frequency_changed_in_training_can_be_saved_and_loaded(before: int, after: int) -> None:
    _, optimizer = kl(before, 5)
    optimizer.param_groups[0]["precondition_frequency"] = after
    saved = optimizer.state_dict()
    for built in (before, after):
        V, again = kl(built, 0)
        again.load_state_dict(saved)
        assert again.param_groups[0]["precondition_frequency"] == after
        assert torch.equal(again.state[V]["L"], optimizer.state_dict()["state"][0]["L"])
        V.grad = torch.ones(6, 10)
        again.step()
        assert torch.isfinite(V).all()
