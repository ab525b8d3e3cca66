"""A survey of a model's parameters: which modules hold them, under which names, and which produce the outputs.

Routing decides by modules and positions, since a local name says little: there is a ``weight`` in every layer, but only
one "weight of the Linear that is the last projection of the model".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Place:
    """A place is one module that holds a parameter; a tied weight has several."""

    name: str
    """The parameter's name there, as in ``model.named_parameters()``."""
    param: Tensor
    path: tuple[nn.Module, ...]
    """The modules from the model down to the one that holds the parameter."""
    local: str
    """The parameter's name within that module."""

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.path[-1]

    @property
    def parent(self) -> nn.Module:
        """The module around the owner; the owner itself if it is the model."""
        return self.path[-2] if len(self.path) > 1 else self.owner

    @property
    def kind(self) -> str:
        """The name of the owner's class, without the prefixes that torch adds."""
        return re.sub("^(Parametrized|NonDynamicallyQuantizable)", "", type(self.owner).__name__)

    @property
    def last_names(self) -> tuple[str, ...]:
        """The names of the owner and of the parameter: ``("c_attn", "weight")``."""
        return tuple(self.name.split(".")[-2:])

    @property
    def is_embedding(self) -> bool:
        """Whether the parameter is a table that is looked up by index."""
        return isinstance(self.owner, nn.Embedding | nn.EmbeddingBag) or hasattr(self.owner, "num_embeddings")

    @property
    def is_norm(self) -> bool:
        """Whether the owner is a normalization layer."""
        return re.search(r"norm\d*d?$", self.kind.lower()) is not None

    @property
    def is_bias(self) -> bool:
        """Whether the parameter is a bias by its name. Those of stacked experts have two dimensions."""
        return "bias" in self.local

    @property
    def is_vector(self) -> bool:
        """Whether at most one dimension is larger than 1, as in scalars, or LayerScale ``[C, 1, 1]``."""
        return sum(size != 1 for size in self.param.shape) < 2

    @property
    def is_lora(self) -> bool:
        """Whether the parameter is a factor of a low-rank adapter."""
        return re.search(r"(^|\.)lora_[ab](\.|$)", self.name.lower()) is not None

    @property
    def is_projection(self) -> bool:
        """Whether the parameter is the weight by which the owner multiplies its input."""
        return self.local == "weight" and self.param.ndim >= 2 and not (self.is_embedding or self.is_norm)

    @property
    def is_in_layers(self) -> bool:
        """Whether the parameter belongs to one of several equal layers, such as the blocks of a transformer."""
        return any(_is_list_of_layers(row, layer) for row, layer in zip(self.path, self.path[1:-1], strict=False))

    @property
    def widths(self) -> tuple[int, int]:
        """The numbers of outputs and inputs of a projection."""
        rows, columns = self.param.shape[0], self.param.shape[1]
        return (columns, rows) if stores_inputs_first(self.owner) else (rows, columns)


@dataclass(frozen=True, eq=False)
class Leaf(Place):
    """A leaf is one parameter at the first of its places, which gives it its name."""

    places: tuple[Place, ...]
    """All its places, the first included."""

    @property
    def tied_head(self) -> Place | None:
        """The projection that shares an embedding's weight, if there is one."""
        if not any(place.is_embedding for place in self.places):
            return None
        return next((place for place in self.places if not place.is_embedding), None)


def survey(model: nn.Module) -> list[Leaf]:
    """Return all parameters of a model, frozen ones included, in the order of ``named_parameters``.

    >>> model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    >>> model["head"].weight = model["table"].weight
    >>> [[place.name for place in leaf.places] for leaf in survey(model)]
    [['table.weight', 'head.weight']]
    """
    leaves: dict[int, list[Place]] = {}
    for place in _places(model, "", ()):
        leaves.setdefault(id(place.param), []).append(place)
    return [Leaf(**vars(places[0]), places=tuple(places)) for places in leaves.values()]


def find_heads(model: nn.Module, leaves: Sequence[Leaf]) -> dict[int, str]:
    """Return the ids of the parameters that produce the model's outputs, each with how it was found.

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


def stores_inputs_first(module: nn.Module) -> bool:
    """Return whether a module's weight is stored as [in, out]: in transposed convolutions and transformers' Conv1D."""
    return isinstance(module, TRANSPOSED_CONVOLUTIONS) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def count_experts(block: nn.Module) -> int | None:
    """Return the number of experts directly in a block: modules in a list, or the leading dimension of 3-D weights."""
    for name, child in block.named_children():
        if "expert" not in name.lower():
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            return len(child)
        for param in child.parameters():
            if param.ndim == 3:
                return param.shape[0]
    return None


def _places(module: nn.Module, prefix: str, above: tuple[nn.Module, ...]) -> Iterator[Place]:
    for local, param in module._parameters.items():
        if param is None:
            continue
        path = (*above, module)
        # A parametrized weight (weight norm, spectral norm) is held by `linear.parametrizations.weight.original`, but
        # it is the weight of the Linear.
        if isinstance(module, ParametrizationList) and len(path) > 2:
            yield Place(f"{prefix}{local}", param, path[:-2], prefix.split(".")[-2])
        else:
            yield Place(f"{prefix}{local}", param, path, local)
    for local, child in module.named_children():
        yield from _places(child, f"{prefix}{local}.", (*above, module))


def _is_list_of_layers(row: nn.Module, layer: nn.Module) -> bool:
    if isinstance(row, nn.ModuleList):
        return True
    if not isinstance(row, nn.Sequential) or isinstance(layer, nn.Sequential):
        return False
    return sum(type(sibling) is type(layer) for sibling in row) > 1


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
    while not model._parameters and len(children := list(model.children())) == 1 and list(children[0].children()):
        model = children[0]
    return model
