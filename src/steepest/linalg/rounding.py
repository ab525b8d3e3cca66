"""Stochastic rounding to bfloat16: up or down at random, so that the mean is exact.

bfloat16 keeps 8 bits, so plain rounding loses every update below 1/512 of its weight, and a small learning rate trains
nothing. Rounded up with a probability of (distance from below) / (gap), a weight moves by the update on average
(Gupta et al., arXiv:1502.02551). A bfloat16 is the upper half of a float32: adding 16 random bits below and cutting
them off is just that.

The random bits are a hash of where an entry lies in its parameter, of the parameter's name, a seed, and the number of
its step. Nothing is drawn from a generator: the global random state stays, a resumed run rounds as the unbroken one,
and a part of a parameter can be rounded by itself as it is with the whole.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def round_stochastically(x: Tensor, index: Tensor, key: Tensor) -> Tensor:
    """``x``, float32, rounded to numbers that bfloat16 has; still float32.

    What bfloat16 has already, infinity and NaN stay as they are; what is finite stays finite.

    Args:
        x: any shape.
        index: int64, of x's shape: where each entry lies in the whole parameter, see `positions`.
        key: int64 scalar, see `rounding_key`.

    Example:
        >>> x = torch.full((1000,), 1 + 0.25 * 2**-7)    # a quarter of the way from 1 to the next bfloat16
        >>> rounded = round_stochastically(x, torch.arange(1000), rounding_key("weight", 0, torch.tensor(1.0)))
        >>> sorted(set(rounded.tolist())), (rounded > 1).float().mean()
        ([1.0, 1.0078125], tensor(0.2730))
    """
    noise = (mixed(index & MASK ^ mixed(index >> 32 ^ key)) & 0xFFFF).int()
    largest = torch.finfo(torch.bfloat16).max
    rounded = (x.view(torch.int32) + noise & ~0xFFFF).view(torch.float32).clamp(-largest, largest)
    return torch.where(torch.isfinite(x), rounded, x)


def rounding_key(name: str, seed: int, step: Tensor) -> Tensor:
    """The key of one parameter in one step, on the step's device: an int64 scalar below 2³².

    Args:
        name: the parameter's.
        seed: tells runs apart.
        step: the count of the parameter's updates, on whatever device; of several, the first counts.
    """
    return mixed(step.reshape(-1)[0].long() & MASK ^ zlib.crc32(f"{seed}, {name}".encode()))


def positions(part: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Where the entries of a part of a parameter lie in the whole, counted row by row: int64, of the part's shape.

    Args:
        part: a view of a contiguous tensor of the whole's shape, such as one on the meta device; only its layout is
            read.
        device: where the numbers are wanted.

    >>> positions(torch.empty(4, 3, device="meta")[1:3, 2:])
    tensor([[5],
            [8]])
    """
    index = torch.full((), int(part.storage_offset()), device=device)
    for size, stride in zip(part.shape, part.stride(), strict=True):
        index = index.unsqueeze(-1) + torch.arange(size, device=device) * stride
    return index


def mixed(x: Tensor) -> Tensor:
    """A 32-bit hash of each number in ``x``, int64 in [0, 2³²): "lowbias32", whose output bits flip by half.

    C. Wellons, "Prospecting for hash functions", https://nullprogram.com/blog/2018/07/31/ (2018).

    >>> mixed(torch.tensor([0, 1]))
    tensor([         0, 1753845952])
    """
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16
