"""The first bases of a matrix come from its gradient's singular vectors: they fit each other, whatever its rank."""

import pytest
import torch

from steepest.linalg import singular
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.singular import shared_eigenvectors, singular_vectors


def matrix(m, n, fall=0.0, dtype=torch.float32, seed=0):
    """``[1, m, n]``, with singular values from 1 down to ``10^-fall``."""
    generator = torch.Generator().manual_seed(seed)
    s = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(d, s, generator=generator, dtype=torch.float64)).Q for d in (m, n))
    return ((U * torch.logspace(0, -fall, s, dtype=torch.float64)) @ V.T).to(dtype)[None]


def grams(G):
    return G @ G.mT, G.mT @ G


def skew(Q):
    return (Q.mT.double() @ Q.double() - torch.eye(Q.shape[-1])).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 1), (1, 7), (7, 7), (40, 12), (12, 40), (64, 64), (130, 65)])
@pytest.mark.parametrize("fall", [1.0, 4.0])
def test_they_make_the_gradient_diagonal_to_rounding(m, n, fall, dtype):
    G, eps = matrix(m, n, fall, dtype), torch.finfo(dtype).eps
    U, V = singular_vectors(G)
    assert max(skew(U), skew(V)) < 20 * eps
    assert U.dtype == V.dtype == dtype
    g = (U.mT.double() @ G.double() @ V.double())[0]
    squared = 10**fall if dtype == torch.float64 else 1.0  # Gᵀ G is no more exact than G then
    assert off_diagonal(g).norm() < 8 * eps * squared * max(m, n) ** 0.5 * G.norm()
    found, values = g.diagonal().abs(), torch.linalg.svdvals(G[0].double())
    torch.testing.assert_close(found, values, rtol=1e-5, atol=float(8 * eps * values[0]))
    assert (found.diff() < 8 * eps * values[0]).all(), "the largest first"


def off_diagonal(g):
    g = g.clone()
    g.diagonal().zero_()
    return g


def test_two_decompositions_leave_a_hundred_times_as_much_off_the_diagonal():
    """They know the covariances, which are rounded, and don't know of each other."""
    G = matrix(128, 128, fall=3.0)
    U, V = singular_vectors(G)
    apart = [eigenvectors(K, True) for K in grams(G)]
    one, two = (off_diagonal((L.mT @ G @ R)[0]).norm() for L, R in ((U, V), apart))
    assert 100 * one < two


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e15])
def test_so_it_is_at_any_scale_for_zeros_and_in_a_batch(scale):
    G = matrix(24, 16)
    stack = torch.cat([G * scale, torch.zeros_like(G), G])
    U, V = singular_vectors(stack)
    assert max(skew(U), skew(V)) < 1e-5
    assert off_diagonal(U[0].T @ G[0] @ V[0]).norm() < 1e-5 * G.norm()
    for one, other in zip(singular_vectors(G), (U[2:], V[2:]), strict=True):
        assert torch.equal(one, other), "a matrix has the same bits in any stack"


@pytest.mark.parametrize(("m", "n"), [(48, 32), (32, 32)])
def test_rounding_does_not_choose_what_completes_a_gradient_of_low_rank(m, n):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(m, 3, generator=generator) @ torch.randn(3, n, generator=generator)
    noise = torch.randn(m, n, generator=generator)
    (U, _), (V, _) = (singular_vectors((G * (1 + size * noise))[None]) for size in (0.0, 1e-7))
    assert skew(U) < 1e-5
    assert ((U[0].T @ V[0])[3:, 3:].abs() - torch.eye(m - 3)).abs().max() < (1e-3 if m > n else 2.0)
    assert (U[0, :, 3:].T @ G).norm() < 1e-5 * G.norm(), "they are orthogonal to all columns of the gradient"


def test_covariances_that_hold_something_else_are_decomposed_in_full():
    """Somebody may have written to one of the two before the first step, of one matrix of a stack."""
    G = torch.cat([matrix(12, 8, seed=seed) for seed in range(3)])
    L, R = grams(G)
    L[1] += 0.1 * grams(matrix(12, 8, seed=9))[0][0]
    Q_L, Q_R = shared_eigenvectors(G, L, R)
    U, V = singular_vectors(G)
    for i in (0, 2):
        assert torch.equal(Q_L[i], U[i])
        assert torch.equal(Q_R[i], V[i])
    assert torch.equal(Q_L[1], eigenvectors(L[1], True))
    assert torch.equal(Q_R[1], eigenvectors(R[1], True))


@pytest.mark.parametrize("factor", [1.0, 0.05, 1e4])
def test_multiples_of_the_gram_matrices_will_do(factor, monkeypatch):
    monkeypatch.setattr(singular, "eigenvectors", lambda K, *_: eigenvectors(K) if K.dtype == torch.float64 else 1 / 0)
    G = torch.cat([matrix(40, 24), torch.zeros(1, 40, 24)])
    L, R = grams(G)
    shared_eigenvectors(G, factor * L, R / factor)


def test_what_cannot_be_decomposed_is_nan():
    G = torch.full((1, 4, 3), torch.nan)
    assert all(Q.isnan().all() for Q in shared_eigenvectors(G, *grams(G)))
