"""A survey of a model's parameters: which modules hold them, and under which names.

Routing decides by modules and positions, since a local name says little: there is a ``weight`` in every layer, but only
one "weight of the Linear that is the last projection of the model".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from steepest.curvature.layer import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, stores_inputs_first

GATE = re.compile(r"(^|_)(gates?|gating|selector|switch)(_|$)", re.IGNORECASE)
"""Names of layers that choose among the modules beside them."""


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
        return self.lora_side != ""

    @property
    def lora_side(self) -> str:
        """Which factor of a low-rank adapter B A the parameter is: "a" reads the input; "" if it is none."""
        found = re.search(r"(?:^|[._])lora_(?:embedding_)?(a|b|down|up)(?:\.|$)", self.name.lower())
        return {"down": "a", "up": "b"}.get(found[1], found[1]) if found else ""

    @property
    def is_projection(self) -> bool:
        """Whether the parameter is the weight by which the owner multiplies its input."""
        return self.local == "weight" and self.param.ndim >= 2 and not (self.is_embedding or self.is_norm)

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


def joined(model: nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]) -> nn.Module:
    """Return the one module that is given, or one that holds the given ones under their keys or indices.

    >>> [name for name, _ in joined({"actor": nn.Linear(2, 3), "critic": nn.Linear(2, 1)}).named_parameters()]
    ['actor.weight', 'actor.bias', 'critic.weight', 'critic.bias']
    """
    if isinstance(model, nn.Module):
        return model
    members = model if isinstance(model, Mapping) else dict(enumerate(model)) if isinstance(model, list | tuple) else {}
    if not members or not all(isinstance(member, nn.Module) for member in members.values()):
        raise TypeError(
            f"model={type(model).__name__}: must be a module, or a list or dict of modules, since modules tell what a "
            "parameter is; pass the model itself, not its parameters (which steepest.create takes)"
        )
    holder = nn.Module()
    holder._modules |= {str(name): member for name, member in members.items()}  # names that add_module refuses, too
    return holder


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


def is_in_layers(path: Sequence[nn.Module]) -> bool:
    """Return whether the last module of a path is within one of several equal layers, as a transformer's blocks are."""
    return any(_is_list_of_layers(row, layer) for row, layer in pairwise(path[:-1]))


def is_numbered(module: nn.Module) -> bool:
    """Return whether a module is a dict of numbered layers: a list, of which a stage of a pipeline keeps some."""
    return isinstance(module, nn.ModuleDict) and all(key.isdecimal() for key in module)


def count_experts(block: nn.Module, gate: str = "") -> int | None:
    """Return the number of experts directly in a block: modules in a list, or the leading dimension of 3-D weights.

    A list of modules beside a layer that is named as a gate needs no name of its own.
    """
    if isinstance(block, nn.ModuleList):
        return None  # names of its modules are indices
    is_gate = GATE.search(gate) is not None
    for name, child in block.named_children():
        named = "expert" in name.lower()
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and (named or is_gate):
            return len(child)
        for param in child.parameters() if named else ():
            if param.ndim == 3:
                return param.shape[0]
    return None


def routes(holder: nn.Module, gate: Tensor, experts: Tensor) -> bool:
    """Return whether a matrix has a row for each of a stack of experts, and reads what they read or make.

    >>> import torch
    >>> gate = nn.Linear(16, 4)
    >>> routes(gate, gate.weight, torch.empty(4, 24, 16)), routes(gate, gate.weight, torch.empty(24, 4, 16))
    (True, False)
    """
    if gate.ndim != 2 or experts.ndim != 3:
        return False
    shapes = (tuple(gate.shape), tuple(gate.mT.shape)) if is_own(holder) else (tuple(gate.shape),)
    return any(rows == len(experts) and columns in experts.shape[1:] for rows, columns in shapes)


def around(place: Place) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield the parameters of the modules around a place, and of the modules directly within these, and who holds them.

    Lists of layers are left out, since those belong to others.
    """
    for block in place.path[-3:]:
        for module in () if isinstance(block, nn.ModuleList) else (block, *block.children()):
            for param in module._parameters.values():
                if param is not None:
                    yield module, param


def is_own(module: nn.Module) -> bool:
    """Return whether a module is a user's own, so that nothing but names and shapes tell of its parameters."""
    known = isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS)
    return not known and not type(module).__module__.startswith("torch.nn")


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
    if is_numbered(row):
        return True
    if not isinstance(row, nn.Sequential) or isinstance(layer, nn.Sequential):
        return False
    return sum(type(sibling) is type(layer) for sibling in row) > 1
