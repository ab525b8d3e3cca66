"""Where a model's parameters stand: by which modules, under which names, tied to what.

Routing looks at places, never at a local name alone: ``weight`` says nothing, "the weight of the Linear that is the
last projection of the model" says everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Place:
    """One place where a module holds a parameter."""

    name: str
    """As in ``model.named_parameters()``."""
    param: Tensor
    path: tuple[nn.Module, ...]
    """From the model down to the module that holds the parameter."""
    local: str
    """What that module calls it."""

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
        """The owner's class, in a word; not what torch makes of it behind the scenes."""
        return re.sub("^(Parametrized|NonDynamicallyQuantizable)", "", type(self.owner).__name__)

    @property
    def call_names(self) -> tuple[str, ...]:
        """What the parameter and its module are called: ``("c_attn", "weight")``."""
        return tuple(self.name.split(".")[-2:])

    @property
    def is_embedding(self) -> bool:
        """Whether it is a table that is looked up by index."""
        return isinstance(self.owner, nn.Embedding | nn.EmbeddingBag) or hasattr(self.owner, "num_embeddings")

    @property
    def is_norm(self) -> bool:
        """Whether its module normalises."""
        return re.search(r"norm\d*d?$", self.kind.lower()) is not None

    @property
    def is_lora(self) -> bool:
        """Whether it is one of the two thin factors of a low-rank adapter."""
        return re.search(r"(^|\.)lora_[ab](\.|$)", self.name.lower()) is not None

    @property
    def is_projection(self) -> bool:
        """Whether it is the weight by which a module multiplies its input."""
        return self.local == "weight" and self.param.ndim >= 2 and not (self.is_embedding or self.is_norm)

    @property
    def is_in_stack(self) -> bool:
        """Whether it is inside a block that stands in a row of blocks, as the layers of a transformer do."""
        return any(_is_row_of_blocks(row, block) for row, block in zip(self.path, self.path[1:-1], strict=False))

    @property
    def widths(self) -> tuple[int, int]:
        """``(outputs, inputs)`` of a projection."""
        rows, columns = self.param.shape[0], self.param.shape[1]
        return (columns, rows) if stores_inputs_first(self.owner) else (rows, columns)


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter and all its places: more than one where weights are tied."""

    places: tuple[Place, ...]

    @property
    def place(self) -> Place:
        """The first place, under whose name the parameter goes."""
        return self.places[0]

    @property
    def name(self) -> str:
        """As in ``model.named_parameters()``."""
        return self.place.name

    @property
    def param(self) -> Tensor:
        """The parameter."""
        return self.place.param

    @property
    def tied_head(self) -> Place | None:
        """The projection that shares this embedding's weight, if one does."""
        if not any(place.is_embedding for place in self.places):
            return None
        return next((place for place in self.places if not place.is_embedding), None)


def survey(model: nn.Module) -> list[Leaf]:
    """Every parameter of the model, frozen ones too, in the order of ``named_parameters``.

    >>> model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    >>> model["head"].weight = model["table"].weight
    >>> [[place.name for place in leaf.places] for leaf in survey(model)]
    [['table.weight', 'head.weight']]
    """
    leaves: dict[int, list[Place]] = {}
    for place in _places(model, "", ()):
        leaves.setdefault(id(place.param), []).append(place)
    return [Leaf(tuple(places)) for places in leaves.values()]


def stores_inputs_first(module: nn.Module) -> bool:
    """Whether the module's weight stands as [in, out]: transformers' Conv1D, and transposed convolutions."""
    return isinstance(module, TRANSPOSED_CONVOLUTIONS) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def count_experts(block: nn.Module) -> int | None:
    """How many experts stand directly in a block: modules in a list, or one leading dimension of 3-D parameters."""
    for name, child in block.named_children():
        if "expert" not in name.lower():
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            return len(child)
        for param in child.parameters():
            if param.ndim == 3:
                return param.shape[0]
    return None


def _places(module: nn.Module, name: str, above: tuple[nn.Module, ...]) -> Iterator[Place]:
    path = (*above, module)
    for local, param in module._parameters.items():
        if param is not None:
            yield _place(f"{name}{local}", param, path, local)
    for local, child in module.named_children():
        yield from _places(child, f"{name}{local}.", path)


def _place(name: str, param: Tensor, path: tuple[nn.Module, ...], local: str) -> Place:
    # A parametrized weight (weight norm, spectral norm) lives at `linear.parametrizations.weight.original`; it is the
    # linear's weight all the same.
    if isinstance(path[-1], ParametrizationList) and len(path) > 2:
        path, local = path[:-2], name.split(".")[-2]
    return Place(name, param, path, local)


def _is_row_of_blocks(row: nn.Module, block: nn.Module) -> bool:
    if isinstance(row, nn.ModuleList):
        return True
    if not isinstance(row, nn.Sequential) or isinstance(block, nn.Sequential):
        return False
    return sum(type(sibling) is type(block) for sibling in row) > 1
