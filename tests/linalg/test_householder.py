"""QR by reflections, where rows of zeros keep columns apart in a cache and where they do not."""

import pytest
import torch

from steepest.linalg import eigenbasis
from steepest.linalg.eigenbasis import CONFLICT, householder, householder_qr


@pytest.mark.parametrize("d", [CONFLICT - 1, CONFLICT])
def test_it_is_torchs_decomposition(d):
    A = torch.randn(2, d, d, generator=torch.Generator().manual_seed(d))
    Q, R = householder_qr(A)
    expected = torch.linalg.qr(A)
    torch.testing.assert_close(Q, expected.Q, atol=1e-5, rtol=0)
    torch.testing.assert_close(R.triu(), expected.R, atol=1e-5 * d**0.5, rtol=0)
    assert Q.mT.is_contiguous()


def test_only_multiples_are_padded(monkeypatch):
    """Elsewhere it would cost time."""
    seen = []
    monkeypatch.setattr(eigenbasis, "CONFLICT", 8)
    geqrf = torch.geqrf
    monkeypatch.setattr(torch, "geqrf", lambda A: (seen.append(A.shape[-2]), geqrf(A))[1])
    for d in (8, 12, 16):
        householder(torch.eye(d))
    assert seen == [8 + eigenbasis.APART, 12, 16 + eigenbasis.APART]


def test_padded_matrices_have_the_same_bits_alone(monkeypatch):
    monkeypatch.setattr(eigenbasis, "CONFLICT", 8)
    A = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0))
    together = householder(A)
    for alone, one in zip(A, together, strict=True):
        assert torch.equal(householder(alone), one)


def test_a_padded_matrix_that_fails_leaves_the_others_alone(monkeypatch):
    monkeypatch.setattr(eigenbasis, "CONFLICT", 8)
    A = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    spoilt = A.clone()
    spoilt[1, 0, 0] = torch.nan
    Q, expected = householder(spoilt), householder(A)
    assert Q[1].isnan().all()
    assert torch.equal(Q[::2], expected[::2])
