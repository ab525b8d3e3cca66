"""Solvers that let a basis follow its matrix: accurate, orthogonal for good, the same in any batch, never raising."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from steepest.linalg import attempts, solvers
from steepest.linalg.eigenbasis import eigenbasis_error
from steepest.linalg.precision import fp32_matmul_precision, tf32_emulated
from steepest.linalg.solvers import SOLVERS, cholesky_qr, choose

FOLLOWING = [name for name in SOLVERS if name != "eigh"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nearly_diagonalized(
    d: int = 24, count: int = 3, tilt: float = 0.03, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Matrices with eigenvalues from 1 down to 1/d, and bases that are off by a small rotation."""
    Q = torch.linalg.qr(randn(count, d, d, dtype=dtype)).Q
    values = 1 / torch.arange(1, d + 1, dtype=dtype)
    X = tilt * randn(count, d, d, seed=1, dtype=dtype)
    return Q * values @ Q.mT, Q @ torch.matrix_exp(X - X.mT)


def drifting(d: int = 16, beta: float = 0.95) -> Iterator[Tensor]:
    """A covariance as training makes it: an average of gradients of half its rank, of a spectrum that falls."""
    scales = torch.arange(1, d + 1).unsqueeze(-1) ** -0.5
    generator = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(1, d, d, generator=generator)).Q
    S = 0.01 * torch.randn(d, d, generator=generator)
    turn = torch.matrix_exp(S - S.T)
    K = torch.zeros(1, d, d)
    while True:
        A = torch.linalg.qr(A @ turn).Q
        G = A @ (scales * torch.randn(d, d // 2, generator=generator))
        K = beta * K + (1 - beta) * G @ G.mT
        yield K


def nonorthogonality(Q: Tensor) -> float:
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


@pytest.fixture(params=[True, False], ids=["cpu", "accelerator"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the solvers as on a CPU, which reads doubtful results, and as on accelerators, which do not."""
    if not request.param:
        for module in (attempts, solvers):
            monkeypatch.setattr(module, "at_hand", lambda x: False)
    return request.param


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_basis_gets_better(name: str, dtype: torch.dtype) -> None:
    K, Q = nearly_diagonalized(dtype=dtype)
    before = eigenbasis_error(K, Q)
    better, order = SOLVERS[name](K, Q, 1)
    assert (eigenbasis_error(K, better) < 0.35 * before).all()
    assert nonorthogonality(better) < (5e-6 if dtype == torch.float32 else 1e-12)
    if name != "eigh":  # there, columns of like eigenvalues may have been anywhere
        continued = Q.gather(-1, order.unsqueeze(-2).expand_as(Q))
        assert ((continued * better).sum(dim=-2).abs() > 0.8).all()
    twice, _ = SOLVERS[name](K, Q, 2)
    if name != "eigh":
        assert (eigenbasis_error(K, twice) < eigenbasis_error(K, better)).all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", SOLVERS)
def test_columns_are_in_order_and_say_where_they_come_from(name: str) -> None:
    K = torch.diag(torch.tensor([1.0, 5.0, 3.0])).expand(2, 3, 3)
    Q, order = SOLVERS[name](K, torch.eye(3).expand(2, 3, 3), 2)
    assert order.tolist() == [[1, 2, 0]] * 2
    torch.testing.assert_close(Q.abs(), torch.eye(3)[:, [1, 2, 0]].expand(2, 3, 3))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_cholesky_is_householder_but_for_signs(dtype: torch.dtype, steps: int) -> None:
    K, Q = nearly_diagonalized(dtype=dtype)
    (ours, order), (theirs, same) = SOLVERS["cholesky"](K, Q, steps), SOLVERS["qr"](K, Q, steps)
    assert torch.equal(order, same)
    atol = 2e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(ours, theirs * (ours * theirs).sum(dim=-2, keepdim=True).sign(), rtol=0, atol=atol)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_basis_that_is_not_orthogonal_recovers(name: str) -> None:
    K, Q = nearly_diagonalized()
    Q = Q + 1e-3 * randn(*Q.shape, seed=3)
    assert nonorthogonality(Q) > 1e-3
    Q, _ = SOLVERS[name](K, Q, 1)
    assert nonorthogonality(Q) < 5e-6


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("refreshes", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_it_stays_orthogonal_and_near(name: str, refreshes: int) -> None:
    worst, errors, Q = 0.0, [], torch.eye(16).unsqueeze(0)
    for t, K in zip(range(refreshes), drifting(), strict=False):
        Q, _ = SOLVERS[name](K, Q, 1)
        worst = max(worst, nonorthogonality(Q))
        if t >= 100:
            errors.append(eigenbasis_error(K, Q).item())
    assert worst < 1e-5
    assert sum(errors) / len(errors) < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_a_result_does_not_depend_on_the_batch(name: str) -> None:
    """A matrix has the same result alone and beside one without full rank and one that is not finite."""
    K, Q = nearly_diagonalized(count=4)
    v = randn(24, 3, seed=5)
    K[1] = v @ v.T
    K[2, 0, 0] = torch.nan
    together, order = SOLVERS[name](K, Q, 1)
    for i in (0, 1, 3):
        alone, one = SOLVERS[name](K[i : i + 1], Q[i : i + 1], 1)
        assert torch.equal(together[i], alone[0])
        assert torch.equal(order[i], one[0])
        assert nonorthogonality(together[i]) < 1e-5
    assert together[2].isnan().any()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e15])
@pytest.mark.parametrize("name", FOLLOWING)
def test_null_directions_and_any_scale(name: str, scale: float) -> None:
    v = randn(24, 3, seed=5)
    K, Q = scale * (v @ v.T).expand(2, 24, 24), torch.linalg.qr(randn(2, 24, 24)).Q
    for _ in range(20):
        Q, _ = SOLVERS[name](K, Q, 1)
    assert nonorthogonality(Q) < 1e-5
    if scale:
        assert (eigenbasis_error(K, Q) < 1e-2).all()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", FOLLOWING)
def test_tf32_leaves_it_orthogonal(name: str) -> None:
    """TF32 may round products with K, but not the products that orthogonalize."""
    K, Q = nearly_diagonalized()
    with tf32_emulated(), fp32_matmul_precision("high"):
        rounded, _ = SOLVERS[name](K, Q, 1)
    exact, _ = SOLVERS[name](K, Q, 1)
    assert not torch.equal(rounded, exact)
    assert nonorthogonality(rounded) < 5e-6


@pytest.mark.parametrize("name", FOLLOWING)
def test_nobody_waits_for_an_accelerator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x: Tensor) -> None:
        raise AssertionError("waits")

    K, Q = nearly_diagonalized()
    for reading in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(Tensor, reading, refuse)
    with pytest.raises(AssertionError, match="waits"):  # a CPU is asked
        SOLVERS[name](K, Q, 1)
    for module in (attempts, solvers):
        monkeypatch.setattr(module, "at_hand", lambda x: False)
    SOLVERS[name](K, Q, 1)


@pytest.mark.parametrize(("closeness", "ways"), [(0.5, 1), (1e-2, 2), (1e-4, 2)])
def test_cholesky_qr_looks_at_its_pivots(closeness: float, ways: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns at a small angle to each other: one pass, two, or Householder's reflections."""
    passes = []
    once = solvers._cholesky_pass
    monkeypatch.setattr(solvers, "_cholesky_pass", lambda A: passes.append(1) or once(A))
    reflections = []
    other = solvers.householder
    monkeypatch.setattr(solvers, "householder", lambda A: reflections.append(1) or other(A))
    A = torch.eye(8).repeat(1, 1, 1)
    A[0, :, 1] = A[0, :, 0] + closeness * A[0, :, 1]
    Q = cholesky_qr(A)
    assert nonorthogonality(Q) < 1e-5
    assert len(passes) == ways
    assert bool(reflections) == (closeness == 1e-4)


def test_auto_is_what_the_documentation_says() -> None:
    assert [choose(device) for device in ("cpu", "cuda", "mps")] == ["qr", "first_order", "first_order"]
