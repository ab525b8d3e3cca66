"""Why a parameter is no hidden matrix, and so runs entry by entry."""

from __future__ import annotations

from collections.abc import Callable

from steepest.routing.sight import TABLE_LIKE
from steepest.routing.survey import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Leaf, count_experts


def is_tied_head(leaf: Leaf) -> bool:
    """One weight, looked up at the input and multiplied at the output."""
    return leaf.tied_head is not None


def is_embedding(leaf: Leaf) -> bool:
    """A table that is looked up by index: its gradient has a few rows, and rows know nothing of each other."""
    return any(place.is_embedding for place in leaf.places)


def is_norm(leaf: Leaf) -> bool:
    """A parameter of any normalisation layer."""
    return leaf.place.is_norm


def is_bias(leaf: Leaf) -> bool:
    """A bias by name, whatever its shape: stacked experts have 2-D ones."""
    return "bias" in leaf.place.local


def is_vector(leaf: Leaf) -> bool:
    """At most one dimension that is larger than 1: scalars, LayerScale ``[C, 1, 1]``, a Linear with one output."""
    return sum(size != 1 for size in leaf.param.shape) < 2


def is_router(leaf: Leaf) -> bool:
    """A weight beside experts, with one row for each of them; or one that is called a router."""
    place = leaf.place
    named = (*place.name.lower().split("."), place.kind.lower())
    if any("router" in name for name in named):
        return True
    if len(leaf.param.shape) != 2 or any("expert" in name for name in named):
        return False
    return any(count_experts(block) == leaf.param.shape[0] for block in place.path[-3:-1])


def is_depthwise(leaf: Leaf) -> bool:
    """A convolution whose every filter reads one channel."""
    owner = leaf.place.owner
    if not isinstance(owner, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        return False
    return owner.groups > 1 and owner.groups == owner.in_channels


REASONS: tuple[tuple[Callable[[Leaf], bool], str], ...] = (
    (is_tied_head, "embedding, tied to the output head"),
    (is_embedding, "embedding: rows are looked up"),
    (is_norm, "norm"),
    (is_bias, "bias"),
    (is_vector, "vector"),
    (is_router, "router: its rows are the experts' logits"),
    (is_depthwise, "depthwise convolution: one filter per channel"),
)
"""The first that holds is the reason. Heads and what looks like no matrix are told apart by position and by `see`."""

TABLE = "learnt table: added, not multiplied"
PLACEHOLDER = "placeholder without its shape"
UNKNOWN = "bare parameter: nothing says it is a matrix"


def unrecognised(leaf: Leaf) -> str:
    """Why a parameter that `see` knows nothing about runs entry by entry."""
    if leaf.param.numel() == 0:
        return PLACEHOLDER
    return TABLE if any(TABLE_LIKE.search(name) for name in leaf.place.call_names) else UNKNOWN
