"""Stochastic rounding to bfloat16, whose mean is exact.

bfloat16 keeps 8 bits, so rounding to nearest loses every update below 1/512 of its weight, and a small learning rate
trains nothing. Stochastic rounding goes up with the probability (distance from the lower neighbour) / (gap), so on
average a weight moves by the update (Gupta et al., arXiv:1502.02551). Since a bfloat16 is the upper half of a float32,
it suffices to add 16 random bits to the lower half and cut it off.

The random bits are a hash of the entry's position in its parameter, the parameter's name, a seed, and the number of the
step. No generator is used: the global random state is unchanged, a resumed run rounds as an uninterrupted one, and a
shard of a parameter is rounded as it is within the whole.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def round_stochastically(x: Tensor, index: Tensor, key: Tensor) -> Tensor:
    """Round float32 ``x`` to numbers that bfloat16 represents; the result is still float32.

    Numbers that bfloat16 represents, infinity and NaN stay as they are. Finite numbers stay finite.

    Args:
        x: float32, of any shape.
        index: the position of each entry in the whole parameter, int64 of x's shape; see `positions`.
        key: an int64 scalar; see `rounding_key`.

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
    """Return the key of one parameter in one step: an int64 scalar below 2³² on the device of ``step``.

    Args:
        name: the name of the parameter.
        seed: a number that differs between runs.
        step: the number of updates of the parameter; the first entry if there are several.
    """
    return mixed(step.reshape(-1)[0].long() & MASK ^ zlib.crc32(f"{seed}, {name}".encode()))


def positions(part: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return the positions of a shard's entries in the whole parameter, counted row by row: int64 of its shape.

    Args:
        part: a view of a contiguous tensor of the whole's shape, such as one on the meta device; only its layout is
            read.
        device: the device of the result.

    >>> positions(torch.empty(4, 3, device="meta")[1:3, 2:])
    tensor([[5],
            [8]])
    """
    index = torch.full((), int(part.storage_offset()), device=device)
    for size, stride in zip(part.shape, part.stride(), strict=True):
        index = index.unsqueeze(-1) + torch.arange(size, device=device) * stride
    return index


def mixed(x: Tensor) -> Tensor:
    """Return a 32-bit hash of each number in ``x``, int64 in [0, 2³²).

    The hash is "lowbias32" of C. Wellons, "Prospecting for hash functions" (2018),
    https://nullprogram.com/blog/2018/07/31/.

    >>> mixed(torch.tensor([0, 1]))
    tensor([         0, 1753845952])
    """
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16
