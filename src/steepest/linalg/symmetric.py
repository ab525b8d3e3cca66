"""Products that are symmetric by construction, at little more than half the price of general ones."""

from __future__ import annotations

from torch import Tensor

BLOCK = 256
"""Rows per block on a CPU; see `accumulate_gram`."""


def accumulate_gram(K: Tensor, X: Tensor, beta: float | Tensor, scale: float = 1.0) -> None:
    """``K ← β K + (1-β) · scale · X Xᵀ``, in place.

    On a CPU, from two blocks of 256 rows up, only the blocks on and below the diagonal are multiplied, and mirrored:
    1.2 to 1.3 times as fast as the whole product at 768 and 1024 rows by 256 columns.

    Args:
        K: ``[..., d, d]``, symmetric.
        X: ``[..., d, n]``.
        beta: a number, or one per matrix ``[..., 1, 1]``.
        scale: a factor on the product.

    Example:
        >>> import torch
        >>> K = torch.eye(2)
        >>> accumulate_gram(K, torch.tensor([[1.0], [2.0]]), beta=0.5)
        >>> K
        tensor([[1.0000, 1.0000],
                [1.0000, 2.5000]])
    """
    K = K.view(-1, *K.shape[-2:])  # a view: the update must reach the caller's tensor
    X = X.reshape(-1, *X.shape[-2:])
    if isinstance(beta, Tensor):
        beta = beta.reshape(-1, 1, 1)
        K.mul_(beta)
        Y, old, new = X * ((1 - beta) * scale), 1.0, 1.0
    else:
        Y, old, new = X, beta, (1 - beta) * scale
    d = K.shape[-1]
    if K.device.type != "cpu" or d < 2 * BLOCK:
        K.baddbmm_(Y, X.mT, beta=old, alpha=new)
        return
    size = -(-d // min(d // BLOCK, 4))
    for start in range(0, d, size):
        stop = min(start + size, d)
        K[:, start:stop, :stop].baddbmm_(Y[:, start:stop], X[:, :stop].mT, beta=old, alpha=new)
        if start:
            K[:, :start, start:stop] = K[:, start:stop, :start].mT
