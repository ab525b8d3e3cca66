"""The blocked Gram product is the plain one, for sizes on both sides of the gate."""

import pytest
import torch

from steepest.linalg.symmetric import BLOCK, ENTRIES, accumulate_gram, gram

LONG = ENTRIES // (2 * BLOCK)  # a row, from which two blocks are done as such


@pytest.mark.parametrize(
    ("d", "n"),
    [(1, 8), (BLOCK, LONG), (2 * BLOCK - 1, LONG + 9), (2 * BLOCK, LONG - 1)]
    + [(k * BLOCK + 5 * (k == 3), LONG) for k in (2, 3, 5)],
)
@pytest.mark.parametrize("beta", [0.9, torch.tensor([0.0, 0.7]).view(2, 1, 1)], ids=["number", "one per matrix"])
def test_it_is_the_plain_product(d, n, beta):
    generator = torch.Generator().manual_seed(d)
    X = torch.randn(2, d, n, generator=generator, dtype=torch.float64)
    K = torch.randn(2, d, 3, generator=generator, dtype=torch.float64)
    K = K @ K.mT
    K = (K + K.mT) / 2
    expected = beta * K + (1 - beta) * 0.5 * X @ X.mT
    accumulate_gram(K, X, beta, scale=0.5)
    torch.testing.assert_close(K, expected)
    if d >= 2 * BLOCK and n >= LONG:
        assert torch.equal(K[:, -1, 0], K[:, 0, -1]), "above the diagonal blocks it is a mirror image"


def test_a_single_matrix_and_more_batch_dimensions():
    X = torch.randn(2, 3, 2 * BLOCK, LONG, generator=torch.Generator().manual_seed(0))
    K = torch.zeros(2, 3, 2 * BLOCK, 2 * BLOCK)
    accumulate_gram(K, X, 0.0)
    one = torch.zeros(2 * BLOCK, 2 * BLOCK)
    accumulate_gram(one, X[1, 2], 0.0)
    torch.testing.assert_close(K[1, 2], one)


def test_what_fresh_memory_held_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: torch.full(shape, torch.nan, dtype=x.dtype))
    X = torch.randn(2, 2 * BLOCK, LONG, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gram(X), X @ X.mT)
