"""Output heads, found by their position in the model, whatever they are called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from steepest.routing.survey import Leaf, Place


def find_heads(model: nn.Module, leaves: Sequence[Leaf]) -> dict[int, str]:
    """Return the ids of the parameters that produce the model's outputs, each with how it was found.

    >>> from steepest.routing.survey import survey
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> heads = find_heads(model, survey(model))
    >>> [heads.get(id(p)) for p in model.parameters()]
    [None, None, 'output head: the last projection', None]
    """
    # Places are put in the order of modules; a tied head has a place of its own, though its parameter comes first.
    order = {id(module): i for i, module in enumerate(model.modules())}
    projections = [place for leaf in leaves for place in leaf.places if place.is_projection and not place.is_lora]
    projections.sort(key=lambda place: order[id(place.owner)])

    heads = {id(place.param): "output head: its outputs feed nothing" for place in _unread(model, projections)}
    if projections and not projections[-1].is_in_layers:
        heads[id(projections[-1].param)] = "output head: the last projection"
    return heads | _declared_heads(model)


def _unread(model: nn.Module, projections: Sequence[Place]) -> list[Place]:
    """Return the heads beside the last projection: they read the same features, and no layer reads their outputs.

    This finds the policy of an actor-critic model beside its value, and heads that are defined before the body.
    """
    if not projections:
        return []
    last = projections[-1]
    features = last.widths[0] if last.is_in_layers else last.widths[1]
    holders = {id(_unwrapped(model)), id(last.parent)}
    read = {place.widths[1] for place in projections}
    return [
        place
        for place in projections
        if isinstance(place.owner, nn.Linear) and not place.is_in_layers and id(place.parent) in holders
        if place.widths[1] == features and read.isdisjoint(_readable_widths(place.widths[0]))
    ]


def _readable_widths(width: int) -> set[int]:
    """Return the widths at which outputs may be read: all of them, fused gate and up, or fused query, key and value.

    >>> sorted(_readable_widths(192))
    [64, 96, 192]
    """
    return {width // parts for parts in (1, 2, 3) if width % parts == 0}


def _declared_heads(model: nn.Module) -> dict[int, str]:
    """Return the heads that Hugging Face models name in ``get_output_embeddings()``."""
    heads: dict[int, str] = {}
    for module in model.modules():
        get_head = getattr(module, "get_output_embeddings", None)
        head = None
        # Backbones without text inherit the method, and raise.
        with suppress(NotImplementedError, AttributeError):
            head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module):
            heads |= {id(p): "output head: get_output_embeddings()" for p in head.parameters() if p.ndim >= 2}
    return heads


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers (DDP, torch.compile, PEFT), which hold nothing but one module."""
    children = list(model.children())
    while len(children) == 1 and not model._parameters and list(children[0].children()):
        model = children[0]
        children = list(model.children())
    return model
