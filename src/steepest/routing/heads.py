"""Output heads, found by position: a head is what the rest of the model leads to, whatever it is called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from steepest.routing.survey import Leaf, Place


def find_heads(model: nn.Module, leaves: Sequence[Leaf]) -> dict[int, str]:
    """The parameters that produce the model's outputs, by id, each with how it was found.

    >>> from steepest.routing.survey import survey
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> heads = find_heads(model, survey(model))
    >>> [heads.get(id(p)) for p in model.parameters()]
    [None, None, 'output head: the last projection', None]
    """
    # A tied head has a place of its own, so places, not parameters, are put in module order.
    order = {id(module): i for i, module in enumerate(model.modules())}
    projections = [place for leaf in leaves for place in leaf.places if place.is_projection and not place.is_lora]
    projections.sort(key=lambda place: order[id(place.owner)])

    heads = {id(place.param): "output head: its outputs feed nothing" for place in _dead_ends(model, projections)}
    if projections and not projections[-1].is_in_stack:
        heads[id(projections[-1].param)] = "output head: the last projection"
    return heads | _declared_heads(model)


def _dead_ends(model: nn.Module, projections: Sequence[Place]) -> list[Place]:
    """Further heads: they read what the last layer reads or writes, and no layer reads what they write.

    So the policy of an actor-critic is found beside its value, and a head that was written down before the body.
    """
    if not projections:
        return []
    last = projections[-1]
    features = last.widths[0] if last.is_in_stack else last.widths[1]
    holders = {id(_unwrapped(model)), id(last.parent)}
    read = {place.widths[1] for place in projections}
    return [
        place
        for place in projections
        if isinstance(place.owner, nn.Linear) and not place.is_in_stack and id(place.parent) in holders
        if place.widths[1] == features and read.isdisjoint(_blocks(place.widths[0]))
    ]


def _blocks(width: int) -> set[int]:
    """What a layer's outputs may be read as: whole, or as the blocks of fused gate and up, or query, key and value.

    >>> sorted(_blocks(192))
    [64, 96, 192]
    """
    return {width // parts for parts in (1, 2, 3) if width % parts == 0}


def _declared_heads(model: nn.Module) -> dict[int, str]:
    """What Hugging Face models answer when asked for their output embeddings."""
    heads: dict[int, str] = {}
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        head = None
        # Backbones without text inherit the method and refuse to answer.
        with suppress(NotImplementedError, AttributeError):
            head = ask() if callable(ask) else None
        if isinstance(head, nn.Module):
            heads |= {id(p): "output head: get_output_embeddings()" for p in head.parameters() if p.ndim >= 2}
    return heads


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers (DDP, torch.compile, PEFT) that hold nothing but one module."""
    children = list(model.children())
    while len(children) == 1 and not model._parameters and list(children[0].children()):
        model = children[0]
        children = list(model.children())
    return model
