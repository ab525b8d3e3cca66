"""The rows that a layer's weight multiplies: tokens for a linear layer, patches for a convolution."""

from __future__ import annotations

import math
from itertools import chain

from torch import Tensor, nn
from torch.nn import functional as F

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def tokens(x: Tensor) -> Tensor:
    """Return a linear layer's inputs or outputs ``[N, ..., n]`` as ``[1, N, S, n]``, with S shared positions.

    >>> import torch
    >>> [tuple(tokens(torch.ones(shape)).shape) for shape in ((3,), (5, 3), (5, 2, 4, 3))]
    [(1, 1, 1, 3), (1, 5, 1, 3), (1, 5, 8, 3)]
    """
    samples = x.shape[0] if x.dim() > 1 else 1
    return x.reshape(1, samples, -1 if x.numel() else 0, x.shape[-1])


def pixels(y: Tensor, module: Convolution) -> Tensor:
    """Return a convolution's outputs ``[N, M, *spatial]`` as ``[G, N, S, M/G]``, for G groups and S positions.

    In memory positions come last, as for `patches`: so products of rows with themselves read them as they are.
    """
    N, M = y.shape[:2]
    y = y.reshape(N, module.groups, M // module.groups, -1).permute(1, 2, 0, 3).contiguous()  # [G, M/G, N, S]
    return y.permute(0, 2, 3, 1)


def patches(x: Tensor, module: Convolution, ones: bool = False) -> Tensor:
    """Return what a convolution multiplies its weight by, from its inputs ``[N, C, *spatial]``: ``[G, N, S, n]``.

    A patch is in the order of ``weight.flatten(1)``: channel, then kernel position. Positions are those of the
    outputs, for any padding (also "same", and modes other than zeros), stride and dilation. With ``ones`` a last column
    of 1 is added, by which the bias is multiplied.

    Example:
        >>> import torch
        >>> convolution = nn.Conv1d(1, 1, 2, dilation=2)
        >>> patches(torch.arange(4.0).view(1, 1, 4), convolution)
        tensor([[[[0., 2.],
                  [1., 3.]]]])
    """
    N, C = x.shape[:2]
    G, dims = module.groups, len(module.kernel_size)
    padding = list(chain.from_iterable(reversed(margins(module))))  # F.pad begins with the last dimension
    if any(padding):
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for i, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]  # the kernel's dimensions come last
    x = x.reshape(N, G, C // G, *x.shape[2:])
    spatial, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    x = x.permute(1, 2, *kernel, 0, *spatial)
    n, positions = math.prod(x.shape[1 : 2 + dims]), math.prod(x.shape[3 + dims :])
    out = x.new_empty(G, n + ones, N, positions)
    out[:, :n].view(x.shape).copy_(x)
    out[:, n:] = 1
    return out.permute(0, 2, 3, 1)


def margins(module: Convolution) -> list[tuple[int, int]]:
    """Return how much a convolution pads before and after, for each spatial dimension."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(width), int(width)) for width in module.padding]
