"""Symmetric matrices in half of their entries, for sending.

The format is LAPACK's rectangular full packed one (Gustavson et al., ACM TOMS 37(2), 2010): the lower triangle of the
second diagonal block lies below the upper triangle of the first, and both fill a rectangle. So whole blocks are copied,
and no entry by its index.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(K: Tensor) -> Tensor:
    """Return symmetric matrices ``[..., d, d]`` as vectors ``[..., d(d+1)/2]``, of which `unpacked` makes them again.

    >>> packed(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    tensor([3., 1., 2.])
    """
    d = K.shape[-1]
    h, k = (d + 1) // 2, d // 2
    rectangle = K.new_zeros(*K.shape[:-2], h, k + 1)
    rectangle[..., -h:] = K[..., :h, :h].triu()
    rectangle[..., h - k :, :k] += K[..., h:, h:].tril()
    return torch.cat([rectangle.flatten(-2), K[..., :h, h:].flatten(-2)], dim=-1)


def unpacked(x: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices ``[..., d, d]`` that were `packed`.

    >>> unpacked(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor([[1., 2.],
            [2., 3.]])
    """
    h, k = (d + 1) // 2, d // 2
    rectangle = x[..., : h * (k + 1)].reshape(*x.shape[:-1], h, k + 1)
    K = x.new_empty(*x.shape[:-1], d, d)
    upper, lower = rectangle[..., -h:].triu(), rectangle[..., h - k :, :k].tril()
    K[..., :h, :h] = upper + upper.triu(1).mT
    K[..., h:, h:] = lower + lower.tril(-1).mT
    K[..., :h, h:] = x[..., h * (k + 1) :].reshape(*x.shape[:-1], h, k)
    K[..., h:, :h] = K[..., :h, h:].mT
    return K
