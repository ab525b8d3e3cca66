"""The functional API: single matrices, any batch dimensions, errors in words, and that SOAP runs on it."""

import contextlib

import pytest
import torch

import steepest
from steepest.linalg.eigenbasis import by_rayleigh_quotient, eigenbasis_error
from steepest.rules.parts import kronecker


def spd(*shape, seed=0):
    x = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed))
    return x @ x.mT


def batches(x, batch):
    return x.expand(*batch, *x.shape).clone()


@pytest.mark.parametrize("batch", [(2,), (2, 3), (1, 2, 2)])
def test_leading_dimensions_are_a_batch(batch):
    G = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    L, R = steepest.init_kronecker_factors([4, 6])
    Ls, Rs = steepest.init_kronecker_factors([*batch, 4, 6])
    steepest.update_kronecker_factors([L, R], G, 0.9)
    steepest.update_kronecker_factors([Ls, Rs], batches(G, batch), 0.9)
    torch.testing.assert_close(Ls, batches(L, batch))
    bases = steepest.get_eigenbasis_eigh([L, R])
    many = steepest.get_eigenbasis_eigh([Ls, Rs])
    steepest.update_kronecker_factors_kl_shampoo([L, R], 2 * G, 0.5, bases, 1e-3)
    steepest.update_kronecker_factors_kl_shampoo([Ls, Rs], 2 * batches(G, batch), 0.5, many, 1e-3)
    torch.testing.assert_close(Rs, batches(R, batch), rtol=1e-4, atol=1e-4)
    v = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    one = steepest.update_eigenbasis_and_exp_avgs([L, R], bases, v.clone(), G)
    all_ = steepest.update_eigenbasis_and_exp_avgs([Ls, Rs], many, batches(v, batch), batches(G, batch))
    torch.testing.assert_close(all_[2], batches(one[2], batch))
    back = [steepest.precondition(m, Q, dims=[[0], [1]]) for Q, m, _ in (one, all_)]
    torch.testing.assert_close(back[1], batches(back[0], batch), rtol=1e-3, atol=1e-4)


def test_a_decay_per_matrix():
    G = torch.ones(2, 2, 3)
    L, R = steepest.init_kronecker_factors([2, 2, 3])
    steepest.update_kronecker_factors([L, R], G, torch.tensor([0.0, 0.5]).view(2, 1, 1))
    assert torch.equal(L[0], torch.full((2, 2), 3.0))
    assert torch.equal(L[1], torch.full((2, 2), 1.5))


def test_kl_feed_by_the_formula():
    """L ← β L + (1-β) G R⁻¹ Gᵀ / n with exact inverses, when nothing is floored."""
    G = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    L, R = spd(3).double() + torch.eye(3), spd(4, seed=1).double() + torch.eye(4)
    want_L = 0.9 * L + 0.1 * G @ torch.linalg.inv(R) @ G.T / 4
    want_R = 0.9 * R + 0.1 * G.T @ torch.linalg.inv(L) @ G / 3
    bases = steepest.get_eigenbasis_eigh([L, R])
    steepest.update_kronecker_factors_kl_shampoo([L, R], G, 0.9, bases, 0.0)
    torch.testing.assert_close(L, want_L)
    torch.testing.assert_close(R, want_R)


def test_iterating_finds_the_eigenvectors():
    K = torch.diag(torch.tensor([1.0, 16.0, 4.0]))
    Q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    Q = steepest.orthogonal_iteration(K, Q, power_iter_steps=30)
    assert eigenbasis_error(K, Q) < 1e-6
    Q, _ = by_rayleigh_quotient(K, Q)
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


def test_criteria():
    K = spd(5)
    Q = steepest.get_eigenbasis_eigh([K])[0]
    assert steepest.all_eigenbases_met_criteria([K, K], [Q, Q], 1e-5)
    assert not steepest.all_eigenbases_met_criteria([K, K], [Q, torch.eye(5)], 1e-5)
    assert steepest.all_eigenbases_met_criteria([None, torch.zeros(5, 5)], [None, torch.eye(5)])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("before", ["highest", "high"])
def test_precision_is_a_scope(precision, before):
    torch.set_float32_matmul_precision(before)
    try:
        backends = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        with contextlib.suppress(KeyError), steepest.fp32_matmul_precision(precision):
            assert torch.get_float32_matmul_precision() == precision
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
        after = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        assert after == backends
    finally:
        torch.set_float32_matmul_precision("highest")


G, EYE = torch.zeros(2, 3), [torch.eye(2), torch.eye(3)]
WRONG = [
    (lambda: steepest.precondition([1.0], EYE), TypeError, "tensor"),
    (lambda: steepest.precondition(torch.zeros(3), EYE), ValueError, r"\[..., m, n\]"),
    (lambda: steepest.precondition(G, [torch.eye(2)]), ValueError, "list of two"),
    (lambda: steepest.precondition(G, torch.eye(2)), ValueError, "list of two"),
    (lambda: steepest.precondition(G, EYE[::-1]), ValueError, "left entry has shape"),
    (lambda: steepest.precondition(G, ["Q", None]), TypeError, "left entry must be a tensor"),
    (lambda: steepest.precondition(G, EYE, dims=[[1], [1]]), ValueError, "dims="),
    (lambda: steepest.init_kronecker_factors([3]), ValueError, "grad_shape"),
    (lambda: steepest.update_kronecker_factors([torch.eye(3), None], G, 0.9), ValueError, "kronecker_factor_list"),
    (lambda: steepest.eigh_with_fallback(torch.zeros(2, 3)), ValueError, "square"),
    (lambda: steepest.eigh_with_fallback("K"), TypeError, "tensor"),
    (lambda: steepest.fp32_matmul_precision("low").__enter__(), ValueError, "'low'"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_shapes_are_refused_in_words(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_soap_runs_on_these_functions(monkeypatch):
    called = set()
    for name in (
        "precondition",
        "update_kronecker_factors",
        "get_eigenbasis_qr",
        "update_kronecker_factors_kl_shampoo",
    ):
        function = getattr(kronecker, name)
        monkeypatch.setattr(kronecker, name, lambda *a, f=function, n=name, **k: called.add(n) or f(*a, **k))
    for kl in (False, True):
        W = torch.nn.Parameter(torch.zeros(2, 3))
        opt = steepest.SOAP([W], lr=0.1, precondition_frequency=1)
        opt.param_groups[0]["use_kl_shampoo"] = kl  # after the state is laid out: the covariances stay as they are
        for _ in range(2):
            W.grad = torch.ones(2, 3)
            opt.step()
    assert len(called) == 4
