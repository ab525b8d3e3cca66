"""Statistics of a layer that several ranks have captured are averaged by the rank that steps its matrix.

Every rank captures the rows of its own samples. Its gradient is the mean of the ranks' gradients, which are means over
their own samples (DDP, FSDP2 and HSDP average so), hence a sample of a rank with fewer samples counts for more. The
factors weigh samples likewise:

    A   the mean of the A of those ranks that have called the layer
    B   the mean of the B of all ranks; a rank that has not called the layer has gradients that are zero

Statistics are the only numbers that are added between ranks, so they are those of one process up to rounding. The owner
adds them in the order of ranks, so that a run can be repeated bit for bit. A and B are symmetric, and half of each is
sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.exchange.all_to_all import AllToAll
from steepest.exchange.peers import Peers
from steepest.linalg.packed import packed, unpacked


@dataclass(frozen=True)
class Target:
    """A piece whose statistics are averaged, and the rank that does it."""

    key: tuple[int, int]
    """The numbers of its parameter and of the piece."""
    owner: int
    A: tuple[int, ...]
    """The shape of its matrices A, ``[..., n, n]``."""
    B: tuple[int, ...]
    """The shape of its matrices B, ``[..., m, m]``."""

    @property
    def entries(self) -> int:
        """Return the number of entries of a message: whether the rank has called the layer, A, and B."""
        return 1 + _entries(self.A) + _entries(self.B)


class Averaging:
    """An exchange of statistics, which is issued when it is made; `wait` averages what has arrived."""

    def __init__(
        self,
        peers: Peers,
        targets: Sequence[Target],
        mine: Mapping[tuple[int, int], tuple[Tensor, Tensor]],
        like: Tensor,
    ) -> None:
        """Send this rank's A and B of each piece to the piece's owner; a rank that has none sends zeros.

        All ranks have the same targets in the same order. ``like`` has the dtype and the device of A and B.
        """
        self.peers = peers
        self.targets = [target for target in targets if target.owner == peers.me]
        outgoing: list[list[Tensor]] = [[] for _ in peers.ranks]
        for target in targets:
            outgoing[target.owner].append(_message(target, mine.get(target.key), like))
        self.arrived = [[like.new_empty(target.entries) for target in self.targets] for _ in peers.ranks]
        self.exchange = AllToAll(peers, outgoing, self.arrived, like)

    def wait(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Return the averages A and B of each piece that this rank owns."""
        self.exchange.wait()
        found = {}
        for target, *messages in zip(self.targets, *self.arrived, strict=True):
            total = messages[0]
            for message in messages[1:]:
                total = total + message
            heard, a, b = total.split([1, _entries(target.A), _entries(target.B)])
            found[target.key] = _matrices(a / heard, target.A), _matrices(b / self.peers.size, target.B)
        return found


def _message(target: Target, statistics: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor:
    if statistics is None:
        return like.new_zeros(target.entries)
    # With parameters that are offloaded to the host, statistics are still on the device.
    return torch.cat([like.new_ones(1), *(packed(K).flatten().to(like) for K in statistics)])


def _entries(shape: Sequence[int]) -> int:
    """Return the number of entries in which matrices of a shape are sent."""
    return math.prod(shape[:-1]) * (shape[-1] + 1) // 2


def _matrices(x: Tensor, shape: Sequence[int]) -> Tensor:
    return unpacked(x.view(*shape[:-2], -1), shape[-1])
