"""A decomposition that fails costs one matrix its refresh, and nothing else: no step is left half done.

LAPACK doesn't fail on demand, so its functions are made to fail here for a matrix that is recognized by its trace, in
float32 and float64, by an exception for the whole batch or by NaN for the one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.linalg import attempts
from steepest.linalg.attempts import attempt, succeeded
from steepest.testing.evidence import expect_same, snapshot

SHAPE = (4, 3)
VICTIM = 1
HUGE = 1e8  # the victim's gradients are so much larger, by which its factors are recognized
LARGE = 1e6

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "soap": ("soap", {}),
    "soap f=2": ("soap", {"precondition_frequency": 2}),
    "soap eigh": ("soap", {"solver": "eigh"}),
    "soap qr": ("soap", {"solver": "qr"}),
    "soap kl": ("soap", {"use_kl_shampoo": True, "solver": "eigh"}),
    "soap after": ("soap", {"basis_timing": "after"}),
    "soap adaptive": ("soap", {"use_adaptive_criteria": True}),
    "soap stagger": ("soap", {"precondition_frequency": 2, "stagger": True}),
    "soap one-sided": ("soap", {"max_precond_dim": 3}),
    "moso": ("moso", {}),
    "moso rmsprop": ("moso", {"inner": "rmsprop"}),
    "shampoo": ("shampoo", {}),
    "shampoo eigh": ("shampoo", {"solver": "eigh"}),
    "kl-shampoo": ("shampoo", {"use_kl_shampoo": True, "exponent": -0.5}),
    "inverse_root": ("inverse_root", {"graft": "adam"}),
    "dion qr": ("dion", {"orthonormalize": "qr"}),
    "dion rcqr": ("dion", {}),
    "muon": ("muon", {"ns": "exact"}),
    "normuon": ("normuon", {"ns": "exact"}),
    "adamuon": ("adamuon", {"ns": "exact", "sign": False}),
    "dion2": ("dion2", {"ns": "exact"}),
}
BASES = {"soap": "Q_", "moso": "Q_", "shampoo": "Q_", "inverse_root": "P_"}


def is_victim(A: Tensor) -> Tensor:
    """Which of the matrices in ``A [..., m, n]`` are made of the victim's gradients."""
    return torch.linalg.matrix_norm(A.double()) > LARGE


def failing(function: Callable[..., Any], how: str, dtypes: tuple[torch.dtype, ...]) -> Callable[..., Any]:
    """LAPACK's ``function`` failing on the victim: "raises" for the whole batch, or "nan" as the victim's result."""

    def broken(A: Tensor, *args: Any, **kwargs: Any) -> Any:
        bad = is_victim(A) & (A.dtype in dtypes)
        if how == "raises":
            if bad.any():
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return function(A, *args, **kwargs)
        results = function(A, *args, **kwargs)
        parts = [x.masked_fill(bad.view(*bad.shape, *[1] * (x.dim() - bad.dim())), torch.nan) for x in results]
        return type(results)(parts) if hasattr(results, "n_fields") else tuple(parts)

    return broken


BOTH = (torch.float32, torch.float64)


@dataclass
class Solvers:
    """LAPACK, working or not."""

    monkeypatch: pytest.MonkeyPatch

    def fail(self, how: str, dtypes: tuple[torch.dtype, ...] = BOTH) -> None:
        for module, name in ((torch.linalg, "eigh"), (torch.linalg, "qr"), (torch.linalg, "svd"), (torch, "geqrf")):
            self.monkeypatch.setattr(module, name, failing(getattr(module, name), how, dtypes))

    def recover(self) -> None:
        self.monkeypatch.undo()


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> Solvers:
    return Solvers(monkeypatch)


def gradient(k: int, i: int) -> Tensor:
    scale = HUGE if i == VICTIM else 1.0
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 * k + i))


class Training:
    """Three matrices of one shape, so of one stack, the second of which is the victim."""

    def __init__(self, name: str) -> None:
        rule, options = RULES[name]
        at_each = {"precondition_frequency": 1} if rule == "soap" else {}
        self.params = [nn.Parameter(torch.ones(SHAPE)) for _ in range(3)]
        self.optimizer = steepest.Optimizer(self.params, rule, **{"lr": 0.01} | at_each | options)
        self.k = 0

    def step(self) -> None:
        for i, p in enumerate(self.params):
            p.grad = gradient(self.k, i)
        self.optimizer.step()
        self.k += 1

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def of(self, i: int) -> dict[str, Any]:
        return snapshot({"weight": self.params[i], "state": self.optimizer.state[self.params[i]]})


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("name", RULES)
def test_a_failure_costs_one_matrix_its_refresh(name: str, how: str, solvers: Solvers) -> None:
    undisturbed, training = Training(name), Training(name)
    before = training.of(VICTIM)
    undisturbed.steps(3)
    solvers.fail(how)
    training.steps(3)
    solvers.recover()
    for i in (0, 2):
        expect_same(training.of(i), undisturbed.of(i), "the others to train as if nothing had happened")
    after = training.of(VICTIM)
    prefix = BASES.get(RULES[name][0])
    bases = [key for key in after if prefix and key.startswith(f"state/{prefix}")]
    assert bases or not prefix
    for key in bases:
        assert torch.equal(after[key], before[key]), f"{key}: still the identity"
    stays = RULES[name][0] in ("dion", "muon", "normuon", "adamuon", "dion2")  # nothing to step along, but weight decay
    shrunk = before["weight"] * (1 - 0.01 * 0.01) ** 3
    assert torch.allclose(after["weight"], shrunk, rtol=1e-6, atol=0) == stays
    assert after["state/step"] == 3
    assert all(torch.isfinite(x).all() for x in after.values())
    expected = {"soap f=2": 4, "soap stagger": 4, "soap one-sided": 3}  # two refreshes of two sides, three of one
    count = expected.get(name, 3 if stays or name.startswith("moso") else 6)
    assert training.optimizer.failed_decompositions == count
    assert undisturbed.optimizer.failed_decompositions == 0

    training.steps(4)
    assert training.optimizer.failed_decompositions == count
    for key in bases:
        assert not torch.equal(training.of(VICTIM)[key], before[key]), f"{key} is refreshed when solvers work again"
    assert not torch.allclose(training.of(VICTIM)["weight"], after["weight"] * (1 - 0.01 * 0.01) ** 4, rtol=1e-6)
    assert all(torch.isfinite(x).all() for x in training.of(VICTIM).values())


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("name", ["soap eigh", "soap", "shampoo eigh", "inverse_root"])
def test_a_later_failure_keeps_basis_and_moments(name: str, how: str, solvers: Solvers) -> None:
    """With a gradient of zero and no decay of the moments, a failed refresh changes nothing at all."""
    training = Training(name)
    for group in training.optimizer.param_groups:
        group["betas"] = (0.0, 0.0)
    training.steps(3)
    bases = {key: x for key, x in training.of(VICTIM).items() if "Q_" in key or "P_" in key}
    solvers.fail(how)
    training.step()
    after = training.of(VICTIM)
    assert len(bases) == 2
    for key, x in bases.items():
        assert torch.equal(after[key], x)
    g = gradient(3, VICTIM)
    if name.startswith("soap"):  # with β = 0 the moments are those of the gradient, in the basis that was kept
        kept = after["state/Q_L"].mT @ g @ after["state/Q_R"]
        torch.testing.assert_close(after["state/exp_avg"], kept)
    assert training.optimizer.failed_decompositions == 2


def test_moments_are_kept_to_the_last_bit(solvers: Solvers) -> None:
    """Turning them out of a basis and back into it would cost their last bits."""
    from steepest.rules.parts.factors import Factors

    G = torch.stack([gradient(0, i) for i in range(3)])
    state = Factors.init(G, max_precond_dim=8) | {"exp_avg": torch.randn_like(G), "exp_avg_sq": torch.rand_like(G)}
    failures = torch.zeros(3, dtype=torch.int64)
    factors = Factors(state, failures)
    factors.accumulate(G, 0.5)
    factors.start(slice(None))
    before = snapshot(state)
    solvers.fail("nan")
    for solver in ("eigh", "qr"):
        factors.refresh(slice(1, 3), solver)
    for name, x in before.items():
        assert torch.equal(state[name][:2], x[:2]), name
        assert torch.equal(state[name][2], x[2]) == (name not in ("Q_L", "Q_R", "exp_avg")), name
    assert failures.tolist() == [0, 4, 0]


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_float64_is_tried_first(how: str, solvers: Solvers) -> None:
    """A decomposition that fails in float32 only does not count as a failure."""
    training, undisturbed = Training("soap"), Training("soap")
    undisturbed.steps(3)
    solvers.fail(how, (torch.float32,))
    training.steps(3)
    assert training.optimizer.failed_decompositions == 0
    for i in (0, 2):
        expect_same(training.of(i), undisturbed.of(i), "the others to train as if nothing had happened")
    Q = training.of(VICTIM)["state/Q_L"]
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4))
    torch.testing.assert_close(Q.abs(), undisturbed.of(VICTIM)["state/Q_L"].abs(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["soap", "soap eigh", "shampoo eigh", "inverse_root", "dion qr", "muon"])
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_on_accelerators_nothing_else_happens(
    name: str, how: str, solvers: Solvers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On accelerators (emulated on the CPU) NaN has the same effect without a second try: the host does not look."""
    expected, training = Training(name), Training(name)
    solvers.fail(how)
    expected.steps(3)
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)
    training.steps(3)
    for i in range(3):
        expect_same(training.of(i), expected.of(i), "the same training")
    assert training.optimizer.failed_decompositions == expected.optimizer.failed_decompositions > 0


def test_a_masked_matrix_does_not_count(monkeypatch: pytest.MonkeyPatch, solvers: Solvers) -> None:
    """A matrix whose gradient is not finite keeps its state on the device, its count of failures included."""
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)
    training = Training("soap")
    training.step()
    for i, p in enumerate(training.params):
        p.grad = torch.full(SHAPE, torch.nan) if i == VICTIM else gradient(1, i)
    solvers.fail("nan")
    training.optimizer.step()
    assert training.optimizer.skipped == 1
    assert training.optimizer.failed_decompositions == 0


def test_cholesky_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.linalg.cholesky_ex` reports by a number, and leaves finite nonsense where it fails."""
    from steepest.linalg.orthonormal import rcqr

    factorize = torch.linalg.cholesky_ex

    def broken(A: Tensor, *, upper: bool) -> Any:
        C, info = factorize(A, upper=upper)
        return C, torch.arange(len(A), dtype=info.dtype) if A.dtype == torch.float32 and len(A) > 1 else info

    A = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0))
    expected = rcqr(A)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    P = rcqr(A)
    assert torch.equal(P[0], expected[0])
    torch.testing.assert_close(P[1], expected[1])
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A, upper: (A, torch.ones(A.shape[:-2])))
    assert rcqr(A).isnan().all()


def test_the_public_functions(solvers: Solvers) -> None:
    """Called directly, the decomposition raises, and the update keeps the old basis and reports it."""
    K = torch.stack([torch.diag(torch.tensor([1.0, 4.0])), HUGE * torch.eye(2)])
    eye, v = torch.eye(2).expand(2, 2, 2), torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0))
    solvers.fail("raises")
    with pytest.raises(torch.linalg.LinAlgError):
        steepest.eigh_with_fallback(K)
    for use_eigh in (True, False):
        (Q_L, Q_R), m, w = steepest.update_eigenbasis_and_exp_avgs([K, K], [eye, eye], v.clone(), v, use_eigh)
        for new, old in ((Q_L, eye), (Q_R, eye), (m, v), (w, v)):
            assert torch.equal(new[1], old[1])
            assert not torch.equal(new[0], old[0])


def test_an_attempt_keeps_batches() -> None:
    A = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    A = A @ A.mT + torch.eye(4)
    expected = torch.linalg.cholesky(A)
    A[1, 2] = -torch.eye(4)
    L = attempt(torch.linalg.cholesky, A)
    assert succeeded(L).tolist() == [[True] * 3, [True, True, False]]
    expected[1, 2] = torch.nan
    torch.testing.assert_close(L, expected, rtol=0, atol=0, equal_nan=True)
    assert attempt(torch.linalg.cholesky, torch.empty(0, 3, 3)).shape == (0, 3, 3)
