"""Eigenvectors by decomposition and by iteration, in any precision, and the errors of wrong arguments."""

from contextlib import nullcontext

import pytest
import torch

import steepest
from steepest.linalg.eigenbasis import eigenbasis_error, eigenvectors
from steepest.linalg.solvers import ordered_iteration
from steepest.rules.parts import factors


def test_iterating_finds_the_eigenvectors():
    K = torch.diag(torch.tensor([1.0, 16.0, 4.0]))
    Q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    Q = steepest.orthogonal_iteration(K, Q, power_iter_steps=30)
    assert eigenbasis_error(K, Q) < 1e-6
    Q, _ = ordered_iteration(K, Q)
    assert steepest.conjugate(K, Q, diag=True).tolist() == pytest.approx([16, 4, 1])


def test_the_solver_falls_back_to_float64(monkeypatch):
    solve, seen = torch.linalg.eigh, []

    def fails_in_float32(K):
        seen.append(K.dtype)
        if K.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(K)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    values, vectors = steepest.eigh_with_fallback(torch.diag(torch.tensor([1.0, 2.0])))
    assert seen == [torch.float32, torch.float64]
    assert values.tolist() == [2, 1]
    assert vectors.dtype == torch.float32


@pytest.mark.parametrize("force_double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decompositions_in_lower_precision_go_by_float32(dtype, force_double):
    X = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    K = (X @ X.T + torch.eye(5)).to(dtype)
    found = steepest.eigh_with_fallback(K, force_double, eps=1e-4)
    A = (K.float() + 1e-4 * torch.eye(5)).to(torch.float64 if force_double else torch.float32)
    want = torch.linalg.eigh(A)
    for x, y in zip(found, want, strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, y.flip(-1).to(dtype))


@pytest.mark.parametrize(
    ("K", "kind"), [(torch.zeros(2, 3), ValueError), (torch.zeros(2), ValueError), ("K", TypeError)]
)
def test_what_is_not_square_is_refused(K, kind):
    with pytest.raises(kind, match="K must be"):
        steepest.eigh_with_fallback(K)


def low_rank(d, rank, gradients=1, dtype=torch.float32):
    """``G Gᵀ`` for columns of lengths from 1 down to 1e-3, and G."""
    generator = torch.Generator().manual_seed(d + rank)
    G = torch.randn(d, rank * gradients, generator=generator, dtype=torch.float64)
    G = (G * torch.logspace(0, -3, rank * gradients)).to(dtype)
    return G @ G.T, G


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "rank"), [(8, 1), (40, 3), (64, 16), (130, 20)])
def test_a_low_rank_gives_the_eigenvectors_of_a_full_decomposition(d, rank, dtype):
    K, G = low_rank(d, rank, dtype=dtype)
    Q, full = (eigenvectors(K, True, rank=r).double() for r in (rank, None))
    eps = torch.finfo(dtype).eps
    assert (Q.T @ Q - torch.eye(d)).abs().max() < 16 * eps
    assert Q.T.is_contiguous()
    exact, found = (torch.linalg.vector_norm(X.T @ G.double(), dim=-1) for X in (full, Q))
    torch.testing.assert_close(found[:rank], exact[:rank], rtol=1e-2, atol=0)  # of small ones, rounding has left little
    assert found[rank:].norm() < max(2 * exact[rank:].norm(), 4 * eps * G.norm())
    for i in range(rank // 2):  # where eigenvalues are far apart
        assert Q[:, i] @ full[:, i] == pytest.approx(1, abs=1e-4) or Q[:, i] @ full[:, i] == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_so_it_is_at_any_scale_and_for_zeros_and_in_a_batch(scale):
    K, _ = low_rank(40, 3)
    Q = eigenvectors(torch.stack([K * scale, torch.zeros_like(K), K]), True, rank=3)
    assert eigenbasis_error(K, Q[0]) < 1e-6
    assert (Q.mT @ Q - torch.eye(40)).abs().max() < 1e-6
    assert torch.equal(Q[2], eigenvectors(K, True, rank=3))


def test_a_matrix_of_higher_rank_is_decomposed_in_full():
    K, _ = low_rank(80, 3, gradients=10)
    assert torch.equal(eigenvectors(K, True, rank=3), eigenvectors(K, True))
    assert eigenvectors(torch.full((40, 40), torch.nan), True, rank=3).isnan().all()


@pytest.mark.parametrize(
    ("rule", "warmup"), [("soap", 0), ("soap", 2), ("kl_soap", 0), ("kl_soap", 2), ("shampoo", 0), ("kl_shampoo", 0)]
)
def test_first_bases_of_thin_matrices_decompose_nothing_large(rule, warmup, monkeypatch):
    solve, sides = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda K: sides.append(K.shape[-1]) or solve(K))
    W = torch.nn.Parameter(torch.zeros(3, 60))
    options = {"adam_warmup_steps": warmup} if warmup else {}
    opt = steepest.Optimizer([W], rule, lr=0.1, **options)
    for seed in range(warmup + 1):
        W.grad = torch.randn(3, 60, generator=torch.Generator().manual_seed(seed))
        opt.step()
    assert opt.state[W]["Q_R"].count_nonzero() > 60
    assert max(sides) <= 3 * (1 + warmup) + 8


@pytest.mark.parametrize("rule", ["soap", "kl_soap", "shampoo", "kl_shampoo"])
def test_a_first_decomposition_of_seconds_is_announced(rule, monkeypatch):
    monkeypatch.setattr(factors, "SLOW", 16)
    for shape, slow in (((16, 16), True), ((16, 15), False), ((4, 16), False)):
        W = torch.nn.Parameter(torch.zeros(shape))
        W.grad = torch.ones(shape)
        opt = steepest.Optimizer([W], rule, lr=0.1)
        with pytest.warns(UserWarning, match="max_precond_dim .* block_size .* solver") if slow else nullcontext():
            opt.step()
        opt.step()  # later refreshes are no news
