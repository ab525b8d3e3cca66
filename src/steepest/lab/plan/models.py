"""The parameters that ``steepest plan`` plans for: of a module from a file, or of well-known models, as shapes alone.

The well-known ones are written down from their papers. Linear weights are [outputs, inputs]. Embeddings, heads, biases
and norms go to the elementwise rule, as `steepest.route` sends them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Weight:
    """A parameter, as whoever plans its step sees it."""

    name: str
    shape: tuple[int, ...]
    view: View | None
    """As which matrices the matrix rule sees it; None if it goes entry by entry."""
    itemsize: int
    """Bytes of an entry of its gradient."""


@dataclass(frozen=True)
class Model:
    """A model's parameters, and the rules that step them."""

    name: str
    weights: tuple[Weight, ...]
    optimizer: str
    rule: Rule | Elementwise
    elementwise: Elementwise
    block_size: int = 0
    """What its matrices were cut by; 0: they are whole."""

    @property
    def parameters(self) -> int:
        """Entries."""
        return sum(torch.Size(weight.shape).numel() for weight in self.weights)

    def cut(self, block_size: int) -> Model:
        """The same, its matrices cut into blocks."""
        weights = tuple(_cut(weight, block_size) for weight in self.weights)
        return replace(self, weights=weights, block_size=block_size)


@dataclass(frozen=True)
class Llama:
    """Linear layers without biases, gated feed-forward, grouped queries, RMS norms."""

    width: int
    layers: int
    hidden: int
    """Of the feed-forward part."""
    keys: int
    """Rows of the key projection, and of the value projection: grouped queries share them."""
    vocabulary: int
    tied: bool = False
    """Whether the head is the embedding."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name, shape, and whether it is a hidden matrix."""
        d, kv, ff = self.width, self.keys, self.hidden
        yield "embed", (self.vocabulary, d), False
        for i in range(self.layers):
            for name, m, n in (
                ("q", d, d), ("k", kv, d), ("v", kv, d), ("o", d, d), ("gate", ff, d), ("up", ff, d), ("down", d, ff)
            ):  # fmt: skip
                yield f"layers.{i}.{name}", (m, n), True
            yield f"layers.{i}.norm1", (d,), False
            yield f"layers.{i}.norm2", (d,), False
        yield "norm", (d,), False
        if not self.tied:
            yield "head", (self.vocabulary, d), False


@dataclass(frozen=True)
class GPT2:
    """Learned positions, biases everywhere, queries, keys and values in one projection, head and embedding tied."""

    width: int = 768
    layers: int = 12
    context: int = 1024
    vocabulary: int = 50257

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], bool]]:
        """Name, shape, and whether it is a hidden matrix."""
        d = self.width
        yield "wte", (self.vocabulary, d), False
        yield "wpe", (self.context, d), False
        for i in range(self.layers):
            for name, m, n in (("attn", 3 * d, d), ("proj", d, d), ("fc", 4 * d, d), ("out", d, 4 * d)):
                yield f"h.{i}.{name}", (m, n), True
                yield f"h.{i}.{name}.bias", (m,), False
            for name in ("ln_1", "ln_1.bias", "ln_2", "ln_2.bias"):
                yield f"h.{i}.{name}", (d,), False
        yield "ln_f", (d,), False
        yield "ln_f.bias", (d,), False


PRESETS: Mapping[str, tuple[str, GPT2 | Llama]] = {
    "124m": ("GPT-2, Radford et al., 2019", GPT2()),
    "1b": ("Llama 3.2 1B, after arXiv:2407.21783", Llama(2048, 16, 8192, 512, 128256, tied=True)),
    "7b": ("Llama 2 7B, arXiv:2307.09288", Llama(4096, 32, 11008, 4096, 32000)),
    "70b": ("Llama 2 70B, arXiv:2307.09288", Llama(8192, 80, 28672, 1024, 32000)),
}
"""Sizes by name, each with its source."""


def preset(name: str, optimizer: str, options: Mapping[str, Any], itemsize: int = 2) -> Model:
    """A well-known model under an optimizer.

    Raises:
        BadInput: if there is no such model, optimizer or option.

    >>> preset("124m", "soap", {}).parameters, preset("70b", "muon", {}).parameters
    (124439808, 68976648192)
    """
    if name not in PRESETS:
        raise BadInput(f"--params {name}: there are {', '.join(PRESETS)}")
    rule = rule_of(optimizer, options)
    weights = tuple(
        Weight(
            weight,
            shape,
            View(shape, split=_split(weight, shape)) if hidden and isinstance(rule, Rule) else None,
            itemsize,
        )
        for weight, shape, hidden in PRESETS[name][1].shapes()
    )
    return Model(name, weights, optimizer, rule, rule if isinstance(rule, Elementwise) else AdamW())


def from_file(path: Path, optimizer: str, options: Mapping[str, Any], itemsize: int | None = None) -> Model:
    """The model that ``model()`` in a Python file makes, on the meta device: nothing of its size is allocated.

    Raises:
        BadInput: if it makes none, or there is no such optimizer or option.
    """
    rule = rule_of(optimizer, options)
    from steepest.lab.listing.command import build_model  # which draws tables, and so needs rich

    with torch.device("meta"):
        built = build_model(path)
    try:
        routing = steepest.route(built, optimizer)
    except ValueError as error:
        raise BadInput(one_line(error)) from error
    weights = tuple(Weight(row.name, row.shape, row.view, itemsize or row.param.itemsize) for row in routing)
    return Model(path.stem, weights, optimizer, rule, rule if isinstance(rule, Elementwise) else AdamW())


def rule_of(optimizer: str, options: Mapping[str, Any]) -> Rule | Elementwise:
    """The rule behind an optimizer's or a recipe's name, with its options.

    >>> rule_of("rekls", {"max_precond_dim": 64}).refresh
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


def _split(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """GPT-2's queries, keys and values are three matrices, as routing would see them."""
    return (shape[0] // 3,) * 3 if name.endswith(".attn") else ()


def _cut(weight: Weight, block_size: int) -> Weight:
    if weight.view is None or weight.view.heads > 1:  # heads are small already
        return weight
    return replace(weight, view=replace(weight.view, block_size=block_size))
