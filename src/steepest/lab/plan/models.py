"""The models that ``steepest plan`` plans for: a module from a file, or a published architecture as shapes alone.

Architectures are written down from their papers. Linear weights are [outputs, inputs]. Embeddings, heads, biases and
norms go to the elementwise rule, as `steepest.route` sends them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import steepest
from steepest.engine.group import option_defaults
from steepest.lab.shared.errors import BadInput, one_line
from steepest.optimizers import group_options
from steepest.rule import Elementwise, Rule, nearest
from steepest.rules import RULES
from steepest.rules.adamw import AdamW
from steepest.view import OPTIONS as VIEW_OPTIONS
from steepest.view import View

Shapes = Iterator[tuple[str, tuple[int, ...], bool]]
"""The name and the shape of every parameter, and whether it is a hidden matrix."""


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape, its view as matrices, and the size of its gradient's entries."""

    name: str
    shape: tuple[int, ...]
    view: View | None
    """Which matrices the matrix rule sees; None for a parameter of the elementwise rule."""
    itemsize: int
    """Bytes of an entry of the gradient."""


@dataclass(frozen=True)
class Model:
    """A model's parameters, and the rules that step them."""

    name: str
    weights: tuple[Weight, ...]
    optimizer: str
    rule: Rule | Elementwise
    elementwise: Elementwise
    block_size: int = 0
    """The largest side of the blocks that its matrices are cut into; 0 for whole matrices."""

    @property
    def parameters(self) -> int:
        """The number of entries of all parameters."""
        return sum(torch.Size(weight.shape).numel() for weight in self.weights)

    def cut(self, block_size: int) -> Model:
        """Return the model with its matrices cut into blocks. Views with heads stay, since heads are small already."""
        weights = tuple(
            weight
            if weight.view is None or weight.view.has_heads
            else replace(weight, view=replace(weight.view, block_size=block_size))
            for weight in self.weights
        )
        return replace(self, weights=weights, block_size=block_size)


def llama(layers: int, d: int, hidden: int, keys: int, vocabulary: int, tied: bool = False) -> Shapes:
    """Yield a Llama of width d: linear layers without biases, gated feed-forward layers, grouped queries, RMS norms.

    Key and value projections have ``keys`` rows, which grouped queries share; ``tied`` makes the embedding the head.
    """
    yield "embed", (vocabulary, d), False
    for i in range(layers):
        for name, m, n in (
            *(("q", d, d), ("k", keys, d), ("v", keys, d), ("o", d, d)),
            *(("gate", hidden, d), ("up", hidden, d), ("down", d, hidden)),
        ):
            yield f"layers.{i}.{name}", (m, n), True
        yield f"layers.{i}.norm1", (d,), False
        yield f"layers.{i}.norm2", (d,), False
    yield "norm", (d,), False
    if not tied:
        yield "head", (vocabulary, d), False


def gpt2(layers: int, d: int = 768, context: int = 1024, vocabulary: int = 50257) -> Shapes:
    """Yield a GPT-2 of width d: learned positions, biases, one projection for queries, keys and values, a tied head."""
    yield "wte", (vocabulary, d), False
    yield "wpe", (context, d), False
    for i in range(layers):
        for name, m, n in (("attn", 3 * d, d), ("proj", d, d), ("fc", 4 * d, d), ("out", d, 4 * d)):
            yield f"h.{i}.{name}", (m, n), True
            yield f"h.{i}.{name}.bias", (m,), False
        for name in ("ln_1", "ln_1.bias", "ln_2", "ln_2.bias"):
            yield f"h.{i}.{name}", (d,), False
    yield "ln_f", (d,), False
    yield "ln_f.bias", (d,), False


class Architecture(NamedTuple):
    """A model as shapes, with as many layers as are asked for."""

    source: str
    layers: int
    shapes: Callable[[int], Shapes]


LLAMA1B = partial(llama, d=2048, hidden=8192, keys=512, vocabulary=128256, tied=True)
LLAMA7B = partial(llama, d=4096, hidden=11008, keys=4096, vocabulary=32000)
LLAMA70B = partial(llama, d=8192, hidden=28672, keys=1024, vocabulary=32000)
PRESETS: Mapping[str, Architecture] = {
    "124m": Architecture("GPT-2, Radford et al., 2019", 12, gpt2),
    "1b": Architecture("Llama 3.2 1B, after arXiv:2407.21783", 16, LLAMA1B),
    "7b": Architecture("Llama 2 7B, arXiv:2307.09288", 32, LLAMA7B),
    "70b": Architecture("Llama 2 70B, arXiv:2307.09288", 80, LLAMA70B),
}
"""Published models by size."""


def preset(name: str, optimizer: str, options: Mapping[str, Any], itemsize: int = 2) -> Model:
    """Return a published model under an optimizer.

    Raises:
        BadInput: for an unknown model, optimizer or option.

    >>> preset("124m", "soap", {}).parameters, preset("70b", "muon", {}).parameters
    (124439808, 68976648192)
    """
    if name not in PRESETS:
        raise BadInput(f"--params {name}: there are {', '.join(PRESETS)}")
    rule = rule_of(optimizer, options)

    weights = []
    for weight, shape, hidden in PRESETS[name].shapes(PRESETS[name].layers):
        # Queries, keys and values in one projection are three matrices, as routing sees them.
        split = (shape[0] // 3,) * 3 if weight.endswith(".attn") else ()
        view = View(shape, split=split) if hidden and isinstance(rule, Rule) else None
        weights.append(Weight(weight, shape, view, itemsize))
    return Model(name, tuple(weights), optimizer, rule, rule if isinstance(rule, Elementwise) else AdamW())


def from_file(path: Path, optimizer: str, options: Mapping[str, Any], itemsize: int | None = None) -> Model:
    """Make the model that ``model()`` in a Python file returns, on the meta device, which allocates nothing.

    Raises:
        BadInput: if the file makes no model, or for an unknown optimizer or option.
    """
    rule = rule_of(optimizer, options)
    from steepest.lab.listing.command import build_model  # it draws tables, so it needs rich

    with torch.device("meta"):
        built = build_model(path)
    try:
        routing = steepest.route(built, optimizer)
    except ValueError as error:
        raise BadInput(one_line(error)) from error
    weights = tuple(Weight(row.name, row.shape, row.view, itemsize or row.param.itemsize) for row in routing)
    return Model(path.stem, weights, optimizer, rule, rule if isinstance(rule, Elementwise) else AdamW())


def rule_of(optimizer: str, options: Mapping[str, Any]) -> Rule | Elementwise:
    """Return the rule behind an optimizer's or a recipe's name, with its options.

    >>> rule_of("rekls", {"max_precond_dim": 64}).solver
    'eigh'
    """
    try:
        settings = group_options(optimizer, dict(options))
        known = option_defaults(settings["rule"])
        for name in settings:
            if name not in known:
                raise ValueError(f"{name}={settings[name]!r}: {optimizer} has no such option{nearest(name, known)}")
            if name in (*VIEW_OPTIONS, "block_size"):
                raise ValueError(
                    f"{name}={settings[name]!r}: the routing says how matrices are seen; --block-size cuts"
                )
        return RULES[settings["rule"]].from_group(known | settings)
    except ValueError as error:
        raise BadInput(one_line(error)) from error
