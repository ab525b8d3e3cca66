"""Heads: the projections whose outputs are those of a model, or of one of the networks in it.

A head is what is last: the last projection of the model, of a network within it, or a projection whose outputs nothing
can read. The order in which modules are declared is mostly that of their use, but need not be; where shapes and names
contradict it, or allow two readings, the heads come with a doubt, which becomes a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import nn

from steepest.routing.survey import Leaf, is_in_layers
from steepest.routing.widths import Weight, may_be_joined, weights

HEAD = re.compile(r"(?:^|_)(heads?|out|outputs?|logits?|classifier|predictor|projection)\d*$", re.IGNORECASE)
NETWORK = re.compile(
    r"(^|_)(generators?|discriminators?|actors?|critics?|policy|policies|values?|teacher|student|towers?|pi|vf|qf?\d?)"
    r"(_|\d|$)|^(net)?_?[GD](_|$)"
)
"""Names of networks that have outputs of their own, though others may read them: an actor's, a generator's."""
STAGE = re.compile(r"(^|_)(encoders?|decoders?|backbone|body|trunk|stem|neck|features?|extractor|embed\w*)(_|\d|$)")
"""Names of stages, whose outputs the next one reads."""
MODULATION = re.compile(r"modulat|ada_?ln|film", re.IGNORECASE)
"""Names of layers that make shifts and scales, which often are declared last."""
UNREAD = "output head: its outputs feed nothing"


@dataclass(frozen=True)
class Heads:
    """Output heads and how they were found, and what is doubtful, by ids of parameters."""

    why: Mapping[int, str]
    doubts: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """A part is a module inside of a model, a layer or a network, with its weights in the order of modules."""

    name: str
    above: tuple[nn.Module, ...]
    """The modules around it, from the model down."""
    weights: Sequence[Weight]

    @property
    def parent(self) -> nn.Module:
        """The module that holds it."""
        return self.above[-1]

    @property
    def is_layer(self) -> bool:
        """Whether it has one weight."""
        return len(self.weights) == 1

    @property
    def last(self) -> Weight | None:
        """Its last projection; None if that belongs to one of several equal layers."""
        projections = [weight for weight in self.weights if weight.place.is_projection]
        if not projections or is_in_layers(projections[-1].place.path[len(self.above) :]):
            return None
        return projections[-1]

    def is_named(self, pattern: re.Pattern[str]) -> bool:
        """Return whether its name matches, or that of the list that it is in."""
        return pattern.search(re.sub(r"(\.\d+)+$", "", self.name).split(".")[-1]) is not None


def find_heads(model: nn.Module, leaves: Sequence[Leaf]) -> Heads:
    """Return the parameters that produce the outputs of a model, or of the networks in it.

    >>> from steepest.routing.survey import survey
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> heads = find_heads(model, survey(model))
    >>> [heads.why.get(id(p)) for p in model.parameters()]
    [None, None, 'output head: the last projection', None]
    """
    found = weights(model, leaves)
    why: dict[int, str] = {}
    doubts: dict[int, str] = {}
    projections = [weight for weight in found if weight.place.is_projection]
    if projections := [weight for weight in projections if not MODULATION.search(weight.place.name)]:
        search = _Search(_unwrapped(model), found, projections[-1])
        for part in search.parts:
            last = part.last
            if last and last is not search.final and (reason := search.judge(part, last, doubts)):
                why.setdefault(id(last.place.param), reason)
        search.judge_final(why, doubts)
    return Heads(why | _declared_heads(model), doubts)


class _Search:
    """A search for heads among the parts of a model."""

    def __init__(self, root: nn.Module, found: Sequence[Weight], declared_last: Weight) -> None:
        self.root, self.weights, self.declared_last = root, found, declared_last
        self.position = {id(weight): i for i, weight in enumerate(found)}
        self.depth = declared_last.place.path.index(root)
        """The number of modules around the root; one more where the root is a list of networks, which are no layers."""
        self.parts = list(_parts(root, "", declared_last.place.path[: self.depth], _by_module(found)))
        if isinstance(root, nn.ModuleList) and not all(_keeps_width(p) for p in self.parts if p.parent is root):
            self.depth += 1
        self.final = None if self._is_in_layers(declared_last) else declared_last
        lists = [child for child in root.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
        self.holders = [*declared_last.place.path[self.depth : -1], *lists]

    def judge(self, part: Part, last: Weight, doubts: dict[int, str]) -> str | None:
        """Return why the last projection of a part is a head, or None if it isn't one; note what is doubtful."""
        readers = self._readers(part, last)
        if part.is_layer:
            return self._judge_layer(part, last, readers)
        reason = f"output head: the last projection of {part.name}"
        if not readers:
            return reason
        if self._is_in_layers(last) or any(self._is_layer_beside(reader, part) for reader in readers):
            return None
        if part.is_named(NETWORK):
            return reason
        if part.parent is not self.root or _has_forward(self.root) or part.is_named(STAGE):
            return None
        if taking := [reader for reader in readers if self._is_open(reader, part)]:
            doubts[id(last.place.param)] = (
                f"is the last projection of {part.name}, but {taking[0].place.name} may read its outputs; "
                "it is taken for an output head"
            )
        return reason

    def judge_final(self, why: dict[int, str], doubts: dict[int, str]) -> None:
        """Add the projection that is declared last, unless a head that was declared before the body may read it."""
        if self.final is None:
            return
        final, param = self.final, id(self.final.place.param)
        parts = [part for part in self.parts if part.parent is self.root]
        around = [part for part in parts if final in part.weights]
        early = [part for part in parts if self._is_early(part, why, final)]
        named = [part for part in early if part.is_named(HEAD)]
        for part in named:
            assert part.last
            why.setdefault(id(part.last.place.param), "output head: by its name")
        if named or (early and any(part.is_named(STAGE) for part in around)):
            return
        networks = all(not part.is_layer for part in early)
        if networks:
            why[param] = "output head: the last projection"
        if early and not any(part.is_named(NETWORK) for part in (*around, early[0])):
            doubts[param] = (
                f"is declared last, but {early[0].weights[0].place.name} may read its outputs; "
                f"it is taken for {'an output head' if networks else 'a hidden matrix'}"
            )

    def _judge_layer(self, part: Part, last: Weight, readers: Sequence[Weight]) -> str | None:
        """Return why a layer of its own is a head: it reads what others make, and its outputs feed nothing."""
        outside = (weight for weight in self.weights if weight is not last)
        if not (isinstance(last.place.owner, nn.Linear) and part.parent in self.holders):
            return None
        if not any(last.may_read(weight) for weight in outside):
            return None
        if not readers:
            return UNREAD
        name, final = (HEAD.search(weight.place.name.rpartition(".")[0]) for weight in (last, self.declared_last))
        beside = part.parent is self.declared_last.place.parent
        return "output head: by its name" if beside and name and final and name[1] == final[1] else None

    def _is_early(self, part: Part, why: Mapping[int, str], final: Weight) -> bool:
        """Return whether a part is a head that may read the final projection, declared before all that it may read."""
        if part.last is None or final in part.weights or part.weights[0].reads != final.makes:
            return False
        if id(part.last.place.param) not in why and not (part.is_layer and part.is_named(HEAD)):
            return False
        before = self.weights[: self.position[id(part.weights[0])]]
        return not any(part.weights[0].may_read(weight) for weight in before)

    def _readers(self, part: Part, last: Weight) -> list[Weight]:
        """Return the weights outside a part that may read its outputs."""
        outside = [weight for weight in self.weights if weight not in part.weights]
        after = self.weights[self.position[id(part.weights[-1])] + 1 :]
        readers = [weight for weight in outside if weight.may_read(last)]
        # Towers have outputs of one width, which may be that of the other's hidden layers, too.
        if not part.is_layer and last.makes == self.declared_last.makes and not _keeps_width(part):
            readers = [weight for weight in readers if self._is_open(weight, part)]
        if readers or not after:
            return readers
        if last.is_convolution:  # branches' channels are joined everywhere
            return [after[0]] if after[0].reads > last.makes else []
        makes = [p.last.makes for p in self.parts if p.parent is part.parent and p is not part and p.last]
        widths = {*makes, part.weights[0].reads}
        return [
            weight
            for weight in after
            if weight.reads != part.weights[0].reads and not weight.is_convolution and self._is_open(weight, part)
            if may_be_joined(last.makes, widths, weight.reads)
        ]

    def _is_open(self, weight: Weight, part: Part) -> bool:
        """Return whether a weight reads what no weight makes in its own network beside a part."""
        networks = [p for p in self.parts if p.parent is part.parent and weight in p.weights]
        return not any(weight.reads == other.makes for p in networks for other in p.weights if other is not weight)

    def _is_layer_beside(self, weight: Weight, part: Part) -> bool:
        return any(p.is_layer and p.parent in part.above and weight in p.weights for p in self.parts)

    def _is_in_layers(self, weight: Weight) -> bool:
        """Return whether a weight belongs to one of several equal layers, such as the blocks of a transformer."""
        return is_in_layers(weight.place.path[self.depth :])


def _parts(
    module: nn.Module, name: str, above: tuple[nn.Module, ...], inside: Mapping[int, Sequence[Weight]]
) -> Iterator[Part]:
    """Yield the modules within one, but for what is inside of equal layers."""
    above = (*above, module)
    for local, child in module.named_children():
        if id(child) not in inside:
            continue
        in_layers = is_in_layers((module, child, child))
        if not in_layers or isinstance(module, nn.ModuleList):
            yield Part(f"{name}{local}", above, inside[id(child)])
        if not in_layers:
            yield from _parts(child, f"{name}{local}.", above, inside)


def _by_module(found: Sequence[Weight]) -> dict[int, list[Weight]]:
    inside: dict[int, list[Weight]] = {}
    for weight in found:
        for module in weight.place.path:
            inside.setdefault(id(module), []).append(weight)
    return inside


def _keeps_width(part: Part) -> bool:
    return part.last is not None and part.weights[0].reads == part.last.makes


def _has_forward(module: nn.Module) -> bool:
    """Return whether a module says how its parts are used; `nn.ModuleDict` and others only hold them."""
    return type(module).forward is not nn.Module.forward


def _declared_heads(model: nn.Module) -> dict[int, str]:
    """Return the heads that Hugging Face models name in ``get_output_embeddings()``, and those of adaptive softmax."""
    heads: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            ends = [module.head, *(list(cluster.children())[-1] for cluster in module.tail)]
            heads |= {id(layer.weight): "output head: one row for each class" for layer in ends}
        get_head = getattr(module, "get_output_embeddings", None)
        head = None
        # Backbones without text inherit the method, and raise.
        with suppress(NotImplementedError, AttributeError):
            head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module):
            heads |= {id(p): "output head: get_output_embeddings()" for p in head.parameters() if p.ndim >= 2}
    return heads


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers (DDP, torch.compile, PEFT), which hold nothing but one module with weights."""
    while not model._parameters and len(children := _with_parameters(model)) == 1 and list(children[0].children()):
        model = children[0]
    return model


def _with_parameters(model: nn.Module) -> list[nn.Module]:
    return [child for child in model.children() if next(child.parameters(), None) is not None]
