"""Widths: the numbers of features that a weight reads and makes, and so which weights may read what another one makes.

Routing sees no forward pass. What it can see is that features pass from one weight to another only where their numbers
fit: as they are, split into blocks, as the pixels of an image, or side by side with other features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from torch import nn

from steepest.curvature.layer import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from steepest.routing.layout import find_layout
from steepest.routing.survey import Leaf, Place

BLOCKS = (1, 2, 3, 4, 6)
"""Into how many blocks people split outputs: gate and up; q, k and v; the gates of an LSTM; shifts and scales."""
FEWEST_PIXELS = 64
"""The fewest outputs of a linear layer that are taken for the pixels of an image."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight at one of its places, with the numbers of features that it reads (0 if indices) and makes."""

    place: Place
    reads: int
    makes: int

    @property
    def is_convolution(self) -> bool:
        """Whether the features are an image's channels."""
        return isinstance(self.place.owner, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS)

    def may_read(self, other: Weight) -> bool:
        """Return whether the outputs of another weight may be this one's inputs.

        >>> from steepest.routing.survey import survey
        >>> model = nn.ModuleList([nn.Linear(8, 48), nn.Linear(16, 5), nn.Linear(8, 5), nn.Embedding(48, 16)])
        >>> qkv, out, other, table = weights(model, survey(model))
        >>> out.may_read(qkv), other.may_read(qkv), out.may_read(table), qkv.may_read(other)
        (True, True, True, False)
        """
        if self.reads == 0:
            return False
        if self.is_convolution and not other.is_convolution:  # folded into pixels
            return other.makes == self.reads or (other.makes >= FEWEST_PIXELS and other.makes % self.reads == 0)
        if other.is_convolution and not self.is_convolution:  # pixels, flattened
            return self.reads % other.makes == 0
        return any(other.makes == blocks * self.reads for blocks in BLOCKS)


def weights(model: nn.Module, leaves: Sequence[Leaf]) -> list[Weight]:
    """Return a model's weights in the order of its modules; those of adapters beside a layer are left out."""
    # A tied head has a place of its own, though its parameter comes first.
    order = {id(module): i for i, module in enumerate(model.modules())}
    places = [place for leaf in leaves for place in leaf.places if not place.is_lora]
    found = [Weight(place, *widths) for place in places if (widths := _widths(place))]
    return sorted(found, key=lambda weight: order[id(weight.place.owner)])


def may_be_joined(makes: int, others: Collection[int], reads: int) -> bool:
    """Return whether features may be read side by side with those of up to three others.

    >>> may_be_joined(4, {10, 1}, 14), may_be_joined(4, {10, 1}, 10)
    (True, False)
    """
    return any(
        makes + sum(some) == reads for count in (1, 2, 3) for some in combinations_with_replacement(others, count)
    )


def _widths(place: Place) -> tuple[int, int] | None:
    owner = place.owner
    if place.param.ndim < 2 or place.param.numel() == 0 or place.is_bias or place.is_norm:
        return None
    if place.is_vector and ".parametrizations." in f".{place.name}":
        return None  # the lengths beside a weight under weight norm
    if place.is_embedding:
        return 0, place.param.shape[-1]
    if isinstance(owner, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        return owner.in_channels, owner.out_channels
    if isinstance(owner, nn.RNNBase):
        makes = (owner.proj_size or owner.hidden_size) * (1 + owner.bidirectional)
        return (place.param.shape[1], makes) if place.local.startswith("weight_ih") else None
    if place.is_projection:
        makes, reads = place.widths
        return reads, makes
    layout = find_layout(place)
    if layout is None:
        return None
    return layout.view.pieces[0][2], sum(rows for _, rows, _ in layout.view.pieces)
