"""The reasons why a parameter is not a hidden matrix and is optimized entry by entry."""

from __future__ import annotations

from collections.abc import Callable

from steepest.routing.layout import TABLE_NAMES
from steepest.routing.survey import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Leaf, count_experts


def is_tied_head(leaf: Leaf) -> bool:
    """Return whether a weight is both an embedding and an output head."""
    return leaf.tied_head is not None


def is_embedding(leaf: Leaf) -> bool:
    """Return whether a parameter is a table that is looked up by index, so that few rows have a gradient."""
    return any(place.is_embedding for place in leaf.places)


def is_norm(leaf: Leaf) -> bool:
    """Return whether a parameter belongs to a normalization layer."""
    return leaf.place.is_norm


def is_bias(leaf: Leaf) -> bool:
    """Return whether a parameter is a bias by its name. Those of stacked experts have two dimensions."""
    return "bias" in leaf.place.local


def is_vector(leaf: Leaf) -> bool:
    """Return whether at most one dimension is larger than 1, as in scalars, or LayerScale ``[C, 1, 1]``."""
    return sum(size != 1 for size in leaf.param.shape) < 2


def is_router(leaf: Leaf) -> bool:
    """Return whether a weight is a router: by its name, or with one row for each of the experts beside it."""
    place = leaf.place
    names = (*place.name.lower().split("."), place.kind.lower())
    if any("router" in name for name in names):
        return True
    if len(leaf.param.shape) != 2 or any("expert" in name for name in names):
        return False
    return any(count_experts(block) == leaf.param.shape[0] for block in place.path[-3:-1])


def is_depthwise(leaf: Leaf) -> bool:
    """Return whether a weight is that of a convolution with one filter per channel."""
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
"""The first predicate that holds gives the reason. Heads, and parameters without a layout, are found elsewhere."""

TABLE = "learnt table: added, not multiplied"
PLACEHOLDER = "placeholder without its shape"
UNKNOWN = "bare parameter: nothing says it is a matrix"


def why_no_layout(leaf: Leaf) -> str:
    """Return why a parameter that no detector recognizes is optimized entry by entry."""
    if leaf.param.numel() == 0:
        return PLACEHOLDER
    return TABLE if any(TABLE_NAMES.search(name) for name in leaf.place.last_names) else UNKNOWN
