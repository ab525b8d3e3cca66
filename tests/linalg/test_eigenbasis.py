"""Eigenvectors by decomposition and by iteration, in any precision, and the errors of wrong arguments."""

import pytest
import torch

import steepest
from steepest.linalg.eigenbasis import by_rayleigh_quotient, eigenbasis_error


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
