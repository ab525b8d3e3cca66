"""A basis that follows a matrix in its own coordinates is the basis that follows the matrix."""

import pytest
import torch

from steepest.linalg import attempts
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.precision import fp32_matmul_precision, tf32_emulated
from steepest.linalg.solvers import SOLVERS, householder_qr
from steepest.linalg.symmetric import BLOCK, accumulate_gram, triangle_product
from steepest.linalg.turning import turn, turned


def drifted(d, dtype=torch.float64):
    """Two matrices, and the eigenvectors of what they were."""
    generator = torch.Generator().manual_seed(d)
    A = torch.randn(2, d, d, generator=generator, dtype=dtype) * torch.arange(1, d + 1) ** -0.7
    noise = torch.randn(2, d, d, generator=generator, dtype=dtype)
    K = A @ A.mT
    return K, eigenvectors(K + 0.01 * noise @ noise.mT)


@pytest.mark.parametrize("d", [1, 7, 40])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_solvers_basis_but_for_signs(solver, steps, d):
    K, Q = drifted(d)
    expected, order = SOLVERS[solver](K, Q, steps)
    found = turn(Q.mT @ K @ Q, solver, steps)
    new = turned(Q, found.U)
    assert torch.equal(found.K, found.K.mT)
    torch.testing.assert_close(found.K, new.mT @ K @ new)
    if (solver, steps) != ("first_order", 2):  # which orders its columns before each step
        assert torch.equal(found.order, order)
        torch.testing.assert_close((expected.mT @ new).abs(), torch.eye(d, dtype=K.dtype).expand(2, d, d))


@pytest.mark.parametrize("d", [2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5])
def test_blocks_of_a_triangle_are_the_whole_product(d):
    K, _ = drifted(d)
    U, R = householder_qr(K)
    found = triangle_product(R, U)
    torch.testing.assert_close(found, R.triu() @ U)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("d", [5, 2 * BLOCK])
@pytest.mark.parametrize("beta", [0.9, torch.tensor([0.0, 0.7]).view(2, 1, 1)], ids=["number", "one per matrix"])
def test_weighted_gram(d, beta):
    generator = torch.Generator().manual_seed(d)
    X = torch.randn(2, d, 8, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    K = torch.eye(d, dtype=torch.float64).expand(2, d, d).clone()
    expected = beta * K + (1 - beta) * 0.5 * X @ torch.diag_embed(weights) @ X.mT
    accumulate_gram(K, X, beta, scale=0.5, weights=weights)
    torch.testing.assert_close(K, expected)


def test_a_skew_basis_is_made_orthogonal_where_one_can_look(monkeypatch):
    _, Q = drifted(16, torch.float32)
    Q[0] += 1e-4 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(16).expand(2, 16, 16)
    skew = lambda Q: (Q.mT @ Q - eye).abs().amax(dim=(-2, -1))  # noqa: E731
    assert skew(turned(Q, eye)).max() < 1e-6
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)
    assert skew(turned(Q, eye))[0] > 1e-5
    assert skew(turned(Q, eye, polish=True)).max() < 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_products_are_exact_whatever_the_precision_around(solver):
    K, Q = drifted(12, torch.float32)
    K = Q.mT @ K @ Q
    exact = turn(K, solver)
    with tf32_emulated(), fp32_matmul_precision("high"):
        found = turn(K, solver)
        assert torch.equal(turned(Q, found.U), turned(Q, exact.U))
    assert torch.equal(found.U, exact.U)
    assert torch.equal(found.K, exact.K)


def test_a_matrix_that_cannot_be_followed_is_nan_and_the_other_is_not():
    K, Q = drifted(6)
    K = Q.mT @ K @ Q
    K[0, 0, 0] = torch.nan
    found = turn(K, "qr")
    assert found.U[0].isnan().any()
    torch.testing.assert_close(found.U[1].mT @ found.U[1], torch.eye(6, dtype=K.dtype))
