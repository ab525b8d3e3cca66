"""Symmetric products on a CPU: whole when small, in blocks when large, and in either case the plain product."""

import pytest
import torch
from gates import measure_blocks

from steepest.linalg import symmetric
from steepest.linalg.polar import polar_factor
from steepest.linalg.symmetric import BLOCK, ENTRIES, gram, symmetric_product


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("d", [1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5, 5 * BLOCK + 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_they_are_the_plain_products(d, transposed):
    n = ENTRIES // (2 * BLOCK)
    X = normal(2, n, d, dtype=torch.float64).mT if transposed else normal(2, d, n, dtype=torch.float64)
    A = gram(X)
    P = symmetric_product(A, A, A, beta=-2.0, alpha=0.5)
    square = symmetric_product(P, A)
    torch.testing.assert_close(A, X @ X.mT)
    torch.testing.assert_close(P, -2 * A + 0.5 * A @ A)
    torch.testing.assert_close(square, P @ A)
    if d >= 2 * BLOCK:
        for K in (A, P, square) if d * d >= ENTRIES else (A,):
            assert torch.equal(K[:, -1, :BLOCK], K[:, :BLOCK, -1]), "outside the diagonal blocks it is a mirror image"


@pytest.mark.parametrize("shape", [(256, 260), (512, 520), (600, 512), (520, 1100)])
def test_bits_do_not_depend_on_the_batch(shape):
    G = normal(3, *shape)
    together = polar_factor(G)
    for one, expected in zip(G, together, strict=True):
        assert torch.equal(polar_factor(one), expected)


@pytest.mark.parametrize("shape", [(520, 560), (1100, 520)])
def test_newton_schulz_is_as_near_in_blocks(shape):
    G = normal(*shape)
    exact = polar_factor(G.double())
    assert (polar_factor(G) - exact).norm() < 1e-4 * exact.norm()


def test_a_bad_matrix_stays_alone():
    G = normal(2, 520, 530)
    expected = polar_factor(G[0])
    G[1, 2, 3] = torch.nan
    O = polar_factor(G)
    assert torch.equal(O[0], expected)
    assert O[1].isnan().any()


def test_what_blocks_are_worth_is_measured_with_and_without(monkeypatch):
    seen = []
    in_blocks = symmetric._in_blocks
    monkeypatch.setattr(symmetric, "_in_blocks", lambda A: seen.append(in_blocks(A)) or seen[-1])
    ratios = measure_blocks([(1, 512, 512)], repeats=1)
    assert ratios.keys() == {(1, 512, 512)}
    assert seen[: len(seen) // 2] == [True] * (len(seen) // 2)
    assert not any(seen[len(seen) // 2 :])
    assert symmetric.BLOCK == BLOCK
