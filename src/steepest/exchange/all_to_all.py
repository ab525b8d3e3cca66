"""An all-to-all exchange of tensors: from every rank to every rank, as bytes, in one ``all_to_all_single``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.exchange.peers import Peers


class AllToAll:
    """An all-to-all is issued when it is made; `wait` fills the tensors that are received.

    All tensors of one exchange have one dtype. A rank copies what it sends to itself, without communication.
    """

    def __init__(
        self, peers: Peers, outgoing: Sequence[list[Tensor]], incoming: Sequence[list[Tensor]], like: Tensor
    ) -> None:
        """Send the tensors in ``outgoing[r]`` to rank r, which fills its ``incoming`` of this rank with them."""
        me = peers.me
        self.targets = [x for rank, xs in enumerate(incoming) if rank != me for x in xs]
        leaving = [x.reshape(-1) for rank, xs in enumerate(outgoing) if rank != me for x in xs]
        self.sent = torch.cat(leaving) if leaving else like.new_empty(0)
        self.received = self.sent.new_empty(sum(x.numel() for x in self.targets))
        self.work = dist.all_to_all_single(
            self.received.view(torch.uint8),  # as bytes, because not every backend knows every dtype
            self.sent.view(torch.uint8),
            _bytes(incoming, me),
            _bytes(outgoing, me),
            group=peers.group,
            async_op=True,
        )
        if outgoing[me]:
            torch._foreach_copy_(incoming[me], outgoing[me])

    def wait(self) -> None:
        """Wait until everything has arrived, and fill the tensors that are received."""
        self.work.wait()
        parts = torch.split(self.received, [x.numel() for x in self.targets])
        if parts:
            torch._foreach_copy_(self.targets, [part.view_as(x) for part, x in zip(parts, self.targets, strict=True)])


def _bytes(tensors: Sequence[Sequence[Tensor]], me: int) -> list[int]:
    """Return the number of bytes for each rank; what stays on this rank is not sent."""
    return [0 if rank == me else sum(x.nbytes for x in xs) for rank, xs in enumerate(tensors)]
