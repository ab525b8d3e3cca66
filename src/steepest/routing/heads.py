"""Heads: the projections whose outputs are those of a model, or of one of the networks in it.

A head is what is last: the last projection of the model, of a network within it, or a projection whose outputs nothing
can read. The order in which modules are declared is mostly that of their use, but need not be; where shapes and names
contradict it, or allow two readings, the heads come with a doubt, which becomes a warning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from steepest.routing.layout import ATTENTION
from steepest.routing.survey import Leaf, is_in_layers, is_numbered
from steepest.routing.widths import Weight, may_be_joined, weights

HEAD = re.compile(r"(?:^|_)(heads?|out|outputs?|logits?|classifier)\d*$", re.IGNORECASE)
BESIDE = re.compile(r"(?:^|_)(heads?|out|outputs?|logits?|classifier|projection)\d*$", re.IGNORECASE)
"""Names of heads, and of what is one beside another of that name: a text projection beside a visual one."""
NETWORK = re.compile(
    r"(^|_)(generators?|discriminators?|actors?|critics?|policy|policies|values?|teacher|student|towers?|pi|vf|qf?\d?)"
    r"(_|\d|$)|^(net)?_?[GD](_|$)"
)
"""Names of networks that have outputs of their own, though others may read them: an actor's, a generator's."""
STAGE = re.compile(r"(^|_)(encoders?|decoders?|backbone|body|trunk|stem|neck|features?|extractor|embed\w*)(_|\d|$)")
"""Names of stages, whose outputs the next one reads."""
MODULATION = re.compile(r"modulat|ada_?ln|film", re.IGNORECASE)
"""Names of layers that make shifts and scales, which often are declared last."""


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

    @cached_property
    def last(self) -> Weight | None:
        """Its last projection; None if that belongs to one of several equal layers."""
        projections = [weight for weight in self.weights if _is_candidate(weight)]
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
    projections = [weight for weight in found if _is_candidate(weight)]
    if not projections:
        return Heads(_declared_heads(model))
    search = _Search(_unwrapped(model), found, projections[-1])
    search.judge_networks()
    search.judge_layers()
    search.judge_final()
    return Heads(search.why | _declared_heads(model), search.doubts)


class _Search:
    """A search for heads among the parts of a model: of networks within it, of layers, and the one declared last."""

    def __init__(self, root: nn.Module, found: Sequence[Weight], final: Weight) -> None:
        self.root, self.weights, self.final = root, found, final
        self.why: dict[int, str] = {}
        self.doubts: dict[int, str] = {}
        self.position = {id(weight): i for i, weight in enumerate(found)}
        self.depth = final.place.path.index(root)
        """The number of modules around the root; one more where the root is a list of networks, which are no layers."""
        self.parts = list(_parts(root, "", final.place.path[: self.depth], _by_module(found)))
        self.part_of = {(id(part.parent), id(weight)): part for part in self.parts for weight in part.weights}
        self.reading = Counter(weight.reads for weight in found)
        if isinstance(root, nn.ModuleList) and not all(_keeps_width(p) for p in self.parts if p.parent is root):
            self.depth += 1
        lists = [child for child in root.children() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
        self.holders = [*final.place.path[self.depth : -1], *lists]
        """The modules in which a layer may be a head: those around other heads, and lists of heads."""

    def judge_networks(self) -> None:
        """Find the last projections of networks that are heads."""
        for part in self.parts:
            last = part.last
            if last is None or part.is_layer or (last is self.final and not self._is_in_layers(last)):
                continue
            if reason := self._why_of_network(part, last):
                self.why.setdefault(id(last.place.param), reason)
                self.holders += [*part.above[self.depth :], *last.place.path[len(part.above) : -1]]

    def judge_layers(self) -> None:
        """Find layers of their own that are heads: they read what others make, and their outputs feed nothing."""
        for part in self.parts:
            last = part.last
            if last is None or not part.is_layer or last is self.final or part.parent not in self.holders:
                continue
            if ATTENTION.search(f"{part.name} {type(part.parent).__name__}"):
                continue
            outside = (weight for weight in self.weights if weight is not last)
            if not isinstance(last.place.owner, nn.Linear) or not any(last.may_read(weight) for weight in outside):
                continue
            if not self._readers(part, last):
                self.why.setdefault(id(last.place.param), "output head: its outputs feed nothing")
            elif part.parent is self.final.place.parent and _named_alike(last, self.final):
                self.why.setdefault(id(last.place.param), "output head: by its name")

    def judge_final(self) -> None:
        """Take the projection that is declared last for a head, unless a head may read it that is declared first."""
        final, param = self.final, id(self.final.place.param)
        if self._is_in_layers(final):
            return
        beside = [part for part in self.parts if part.parent is self.root]
        around = [part for part in beside if final in part.weights]
        early = [part for part in beside if self._is_early(part)]
        entries = [part.weights[0] for part in beside if not part.is_layer and part not in early]
        # As many features as the model's inputs have: then a network that is declared first may read those.
        as_inputs = any(entry.reads == final.makes and self._reads_what_nothing_makes(entry) for entry in entries)
        is_head = as_inputs or not any(part.is_layer for part in early)
        if early and not as_inputs and any(part.is_named(HEAD) for part in early):
            for part in early:
                assert part.last
                self.why.setdefault(id(part.last.place.param), "output head: by its name")
            return
        if early and not as_inputs and any(part.is_named(STAGE) for part in around):
            return
        if is_head:
            self.why[param] = "output head: the last projection"
        if early and not any(part.is_named(NETWORK) or part.is_named(STAGE) for part in (*around, *early)):
            self.doubts[param] = (
                f"is declared last, but {early[0].weights[0].place.name} may read its outputs; "
                f"it is taken for {'an output head' if is_head else 'a hidden matrix'}"
            )

    def _why_of_network(self, part: Part, last: Weight) -> str | None:
        """Return why the last projection of a network is a head, or None if it isn't one; note a doubt."""
        reason = f"output head: the last projection of {part.name}"
        if self._is_in_layers(last) and self._is_read_elsewhere(part, last):
            return None  # which spares looking for readers of each of many layers
        readers = self._readers(part, last)
        if not readers:
            return reason
        beside = [self.part_of.get((id(parent), id(reader))) for parent in part.above for reader in readers]
        if any(other and other.is_layer for other in beside) or self._is_in_layers(last) or part.is_named(STAGE):
            return None
        if part.is_named(NETWORK):
            return reason
        if part.parent is not self.root or _has_forward(self.root):
            return None
        if taking := [reader for reader in readers if self._is_open(reader, part)]:
            self.doubts[id(last.place.param)] = (
                f"is the last projection of {part.name}, but {taking[0].place.name} may read its outputs; "
                "it is taken for an output head"
            )
        return reason

    def _is_early(self, part: Part) -> bool:
        """Return whether a part is a head that may read the final projection, declared before all that it may read."""
        first, last = part.weights[0], part.last
        if last is None or self.final in part.weights or first.reads != self.final.makes:
            return False
        by_name = part.is_layer and part.is_named(HEAD) and not HEAD.search(self.final.place.name.rpartition(".")[0])
        if id(last.place.param) not in self.why and not by_name:
            return False
        return self._reads_what_nothing_makes(first)

    def _readers(self, part: Part, last: Weight) -> list[Weight]:
        """Return the weights outside a part that may read its outputs."""
        own, first = {id(weight) for weight in part.weights}, part.weights[0]
        after = self.weights[self.position[id(part.weights[-1])] + 1 :]
        readers = [
            weight
            for weight in self.weights
            if id(weight) not in own and weight.may_read(last)
            if weight.reads == last.makes or self._is_open(weight, part)
        ]
        if not part.is_layer:
            readers = [weight for weight in readers if not self._reads_inputs(weight, part, last)]
            # Towers have outputs of one width, which may be that of the other's hidden layers, too.
            if last.makes == self.final.makes and first.reads != last.makes:
                readers = [weight for weight in readers if self._is_open(weight, part)]
        if readers or not after:
            return readers
        if last.is_convolution:  # branches' channels are joined everywhere
            return [after[0]] if after[0].reads > last.makes else []
        widths = {p.last.makes for p in self.parts if p.parent is part.parent and p is not part and p.last}
        return [
            weight
            for weight in after
            if weight.reads != first.reads and not weight.is_convolution and self._is_open(weight, part)
            if may_be_joined(last.makes, {*widths, first.reads}, weight.reads)
        ]

    def _reads_inputs(self, weight: Weight, part: Part, last: Weight) -> bool:
        """Return whether a weight seems to read the model's inputs, or what its own network makes of the same inputs.

        A part's inputs are the model's if nothing before makes them, and so are those of a network declared before.
        """
        first, network = part.weights[0], self.part_of.get((id(part.parent), id(weight)))
        reads_inputs = self._reads_what_nothing_makes(first)
        if weight.reads == first.reads != last.makes:
            return reads_inputs
        if network is None or network.is_layer:
            return False
        entry = network.weights[0]
        if weight is entry:
            return self.position[id(entry)] < self.position[id(first)] and self._reads_what_nothing_makes(entry)
        return reads_inputs and entry.reads == first.reads != 0 and not self._is_open(weight, part)

    def _reads_what_nothing_makes(self, weight: Weight) -> bool:
        """Return whether no weight that is declared before one makes what it reads."""
        return not any(weight.may_read(other) for other in self.weights[: self.position[id(weight)]])

    def _is_open(self, weight: Weight, part: Part) -> bool:
        """Return whether a weight reads what no weight before it makes in its own network, which is beside a part."""
        network = self.part_of.get((id(part.parent), id(weight)))
        before = network.weights[: self.position[id(weight)] - self.position[id(network.weights[0])]] if network else ()
        return not any(weight.reads == other.makes for other in before)

    def _is_read_elsewhere(self, part: Part, last: Weight) -> bool:
        """Return whether a weight outside of a part reads just as many features as the part makes."""
        inside = sum(weight.reads == last.makes for weight in part.weights)
        return last.makes != self.final.makes and self.reading[last.makes] > inside

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


def _is_candidate(weight: Weight) -> bool:
    return weight.place.is_projection and not MODULATION.search(weight.place.name)


def _by_module(found: Sequence[Weight]) -> dict[int, list[Weight]]:
    inside: dict[int, list[Weight]] = {}
    for weight in found:
        for module in weight.place.path:
            inside.setdefault(id(module), []).append(weight)
    return inside


def _keeps_width(part: Part) -> bool:
    return part.last is not None and part.weights[0].reads == part.last.makes


def _named_alike(*weights: Weight) -> bool:
    """Return whether the layers of weights have names of heads with the same last word: visual and text projection."""
    found = [BESIDE.search(weight.place.name.rpartition(".")[0]) for weight in weights]
    return None not in found and len({match[1] for match in found if match}) == 1


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
    while (
        not (model._parameters or is_numbered(model))
        and len(children := _with_parameters(model)) == 1
        and list(children[0].children())
    ):
        model = children[0]
    return model


def _with_parameters(model: nn.Module) -> list[nn.Module]:
    return [child for child in model.children() if next(child.parameters(), None) is not None]
