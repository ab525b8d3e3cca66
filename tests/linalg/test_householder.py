"""QR by reflections, where rows of zeros keep columns apart in a cache and where they do not."""

import pytest
import torch

from steepest.linalg import solvers
from steepest.linalg.eigenbasis import eigenvectors
from steepest.linalg.orthonormal import rcqr
from steepest.linalg.solvers import CONFLICT, cholesky_qr, householder, householder_qr


@pytest.mark.parametrize("d", [37, 48, CONFLICT])
def test_it_is_torchs_decomposition(d):
    A = torch.randn(2, d, d, generator=torch.Generator().manual_seed(d))
    Q, R = householder_qr(A)
    expected = torch.linalg.qr(A)
    torch.testing.assert_close(Q, expected.Q, atol=1e-5, rtol=0)
    torch.testing.assert_close(R.triu(), expected.R, atol=1e-5 * d**0.5, rtol=0)
    assert Q.mT.is_contiguous()


def test_only_multiples_are_padded(monkeypatch):
    """Columns that are aligned and apart are not padded, since padding costs time."""
    seen = []
    monkeypatch.setattr(solvers, "CONFLICT", 32)
    geqrf = torch.geqrf
    monkeypatch.setattr(torch, "geqrf", lambda A: (seen.append(A.shape[-2]), geqrf(A))[1])
    for d in (9, 16, 20, 32, 48, 64):
        householder(torch.eye(d))
    assert seen == [16, 16, 20, 48, 48, 80]


@pytest.mark.parametrize("d", [9, 12, 17, 20, 33, 37, 130])
@pytest.mark.parametrize("decompose", [householder, eigenvectors, cholesky_qr, rcqr])
def test_matrices_have_the_same_bits_alone(decompose, d):
    """A matrix has the same bits alone as anywhere in a stack, at any address."""
    A = torch.randn(3, d, d, generator=torch.Generator().manual_seed(0))
    A = A + A.mT
    for alone, one in zip(A, decompose(A), strict=True):
        found = decompose(alone.clone())
        assert torch.equal(found, one)
        assert found.stride() == one.stride()


def test_a_padded_matrix_that_fails_leaves_the_others_alone():
    A = torch.randn(3, 17, 17, generator=torch.Generator().manual_seed(0))
    spoilt = A.clone()
    spoilt[1, 0, 0] = torch.nan
    Q, expected = householder(spoilt), householder(A)
    assert Q[1].isnan().all()
    assert torch.equal(Q[::2], expected[::2])
