"""Tensors from every rank to every rank, as bytes, in one ``all_to_all_single``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.exchange.domain import Domain


class Shipment:
    """Tensors on their way to other ranks, and others on their way from there. They set out when it is made.

    All tensors of one shipment have one dtype. What comes from this rank itself is copied, and sent to nobody.
    """

    def __init__(
        self, domain: Domain, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]], like: Tensor
    ) -> None:
        """``outgoing[r]`` leaves for rank r; ``incoming[r]``, in rank r's order, is filled when it is unloaded."""
        me = domain.me
        self.own = [(place, x) for place, x in zip(incoming[me], outgoing[me], strict=True)]
        self.places = [place for rank, places in enumerate(incoming) if rank != me for place in places]
        leaving = [x.reshape(-1) for rank, xs in enumerate(outgoing) if rank != me for x in xs]
        self.sent = torch.cat(leaving) if leaving else like.new_empty(0)
        self.received = self.sent.new_empty(sum(place.numel() for place in self.places))
        self.arrival = dist.all_to_all_single(
            self.received.view(torch.uint8),  # as bytes: not every backend knows every dtype
            self.sent.view(torch.uint8),
            _bytes(incoming, me),
            _bytes(outgoing, me),
            group=domain.group,
            async_op=True,
        )
        if self.own:
            torch._foreach_copy_([place for place, _ in self.own], [x for _, x in self.own])

    def unload(self) -> None:
        """Wait until everything is there, and fill the places."""
        self.arrival.wait()
        pieces = torch.split(self.received, [place.numel() for place in self.places])
        if pieces:
            torch._foreach_copy_(
                self.places, [piece.view(place.shape) for place, piece in zip(self.places, pieces, strict=True)]
            )


def _bytes(sides: Sequence[Sequence[Tensor]], me: int) -> list[int]:
    """How many bytes each rank's share has; this rank's own is not sent."""
    return [0 if rank == me else sum(x.numel() * x.element_size() for x in xs) for rank, xs in enumerate(sides)]
