"""Symmetric matrices in half of their entries come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from steepest.linalg.packed import packed, unpacked


@pytest.mark.parametrize("batch", [(), (3,), (2, 0)])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 10])
def test_there_and_back(d: int, batch: tuple[int, ...]) -> None:
    K = torch.randn(*batch, d, d, generator=torch.Generator().manual_seed(d))
    K = K + K.mT
    x = packed(K)
    assert x.shape == (*batch, d * (d + 1) // 2)
    assert torch.equal(unpacked(x, d), K)


def test_nan_and_infinity_stay_where_they_are() -> None:
    K = torch.eye(5)
    K[0, 4] = K[4, 0] = torch.nan
    K[3, 3] = torch.inf
    assert torch.equal(unpacked(packed(K), 5).isnan(), K.isnan())
    assert torch.equal(unpacked(packed(K), 5).isinf(), K.isinf())
