"""The classification of a parameter: the rule that optimizes it, as which matrices, and why, or as the user decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn

from steepest.curvature.layer import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from steepest.engine.group import StackOptions
from steepest.optimizers import group_options
from steepest.routing.layout import TABLE_NAMES, Layout, find_layout
from steepest.routing.survey import Leaf, around, count_experts, is_own, routes
from steepest.routing.table import Row
from steepest.rule import Rule
from steepest.rules import RULES
from steepest.rules.aliases import resolve
from steepest.stack.storage import laid_out
from steepest.view import OPTIONS, View

Key = str | type[nn.Module]
Overrides = Mapping[Key, str | Mapping[str, Any]]
"""From a name pattern or a module type to an optimizer's name, or to options: ``rule``, ``lr``, a view's and others."""


STATE_SPACE = re.compile(r"a_logs?|log_a\w*|a_imag", re.IGNORECASE)


def _is_router(leaf: Leaf) -> bool:
    """Return whether a weight is a router: by its name, or with one row for each of the experts around it."""
    names = (*leaf.name.lower().split("."), leaf.kind.lower())
    if any("router" in name for name in names):
        return True
    if len(leaf.param.shape) != 2 or any("expert" in name for name in names):
        return False
    if any(count_experts(block, leaf.last_names[0]) == leaf.param.shape[0] for block in leaf.path[-3:-1]):
        return True
    return any(is_own(module) and routes(leaf.owner, leaf.param, param) for module, param in around(leaf))


def _is_depthwise(leaf: Leaf) -> bool:
    """Return whether a weight is that of a convolution with one filter per channel."""
    owner = leaf.owner
    if not isinstance(owner, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        return False
    return owner.groups > 1 and owner.groups == owner.in_channels


REASONS: tuple[tuple[Callable[[Leaf], bool], str], ...] = (
    (lambda leaf: leaf.tied_head is not None, "embedding, tied to the output head"),
    (lambda leaf: any(place.is_embedding for place in leaf.places), "embedding: rows are looked up"),
    (lambda leaf: leaf.is_norm, "norm"),
    (lambda leaf: leaf.is_bias, "bias"),
    (lambda leaf: leaf.is_vector, "vector"),
    (_is_router, "router: its rows are the experts' logits"),
    (lambda leaf: STATE_SPACE.fullmatch(leaf.local) is not None, "diagonals of a state space: multiplied entrywise"),
    (_is_depthwise, "depthwise convolution: one filter per channel"),
)
"""Why a parameter is no hidden matrix: the first predicate that holds gives the reason. Heads are found elsewhere."""

UNKNOWN = "bare parameter: nothing says it is a matrix"


def classify(leaf: Leaf, rule: str, elementwise: str, others: Mapping[int, str], override: Mapping[str, Any]) -> Row:
    """Return the row of a parameter: by ``rule`` if it is a hidden matrix, else by ``elementwise``, or as overridden.

    ``others`` are the ids of output heads and of what the user has named, with why they are no hidden matrices;
    ``override`` holds the user's options.
    """
    layout, why = _hidden_layout(leaf, others)
    hidden = layout is not None
    options = resolve({"rule": rule if hidden else elementwise, **override})
    rule = options.pop("rule")
    view_options = {name: options.pop(name) for name in OPTIONS if name in options}
    if is_matrix_rule(rule):
        layout = layout or find_layout(leaf) or Layout(View(tuple(leaf.param.shape)))
        layout = adjusted(leaf, layout, view_options) if view_options else layout
        hidden = True
    elif view_options:
        raise ValueError(f"{leaf.name}: {', '.join(view_options)} mean nothing to {rule}, which works entry by entry")
    else:
        layout = None
        hidden = hidden and "rule" not in override
    pieces = layout.view.pieces if layout else [(1, 1, leaf.param.numel())]
    has_bases = "max_precond_dim" in RULES[rule].defaults()
    longest = options.get("max_precond_dim") if has_bases else None
    rank = min(pieces[0][1:]) if has_bases and longest is None and leaf.is_lora else None
    if rank:
        why = f"{why}, without a basis of its long side"
    return Row(
        name=leaf.name,
        param=leaf.param,
        rule=rule,
        view=layout.view if layout else None,
        layout=str(layout) if layout else "×".join(map(str, leaf.param.shape)) or "scalar",
        why=f"override (else {why})" if override else why,
        state_bytes=sum(state_bytes(rule, piece, rank if longest is None else longest) for piece in pieces),
        hidden=hidden,
        decays=not (leaf.is_vector or leaf.is_norm or leaf.is_bias),
        options=options,
        longest_basis=rank,
    )


def resolve_overrides(overrides: Overrides, leaves: Sequence[Leaf]) -> dict[int, dict[str, Any]]:
    """Return the overridden options of each parameter, by id.

    Later overrides change earlier ones, or replace them if they name a rule.

    >>> from steepest.routing.survey import survey
    >>> leaves = survey(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    >>> list(resolve_overrides({nn.Linear: "soap", "1.weight": {"lr": 0.1}}, leaves).values())
    [{'rule': 'soap'}, {'rule': 'soap', 'lr': 0.1}]
    >>> resolve_overrides({"1.wieght": "adamw"}, leaves)
    Traceback (most recent call last):
    ValueError: override '1.wieght' matches no parameter; the nearest is '1.weight'
    """
    resolved: dict[int, dict[str, Any]] = {}
    for key, value in overrides.items():
        settings = {"rule": value} if isinstance(value, str) else dict(value)
        if "rule" in settings:
            settings = group_options(settings.pop("rule"), settings)
        matched = [leaf for leaf in leaves if _matches(key, leaf)]
        affected = [leaf for leaf in matched if leaf.param.requires_grad and not _spares(leaf, settings)]
        if not affected:
            raise ValueError(_no_match(key, matched, leaves))
        for leaf in affected:
            before = {} if "rule" in settings else resolved.get(id(leaf.param), {})  # options belong to their rule
            resolved[id(leaf.param)] = before | settings
    return resolved


def is_matrix_rule(name: str) -> bool:
    """Return whether a rule optimizes matrices, not entries."""
    return issubclass(RULES[name], Rule)


@cache
def state_bytes(rule: str, piece: tuple[int, int, int], longest_basis: int | None = None) -> int:
    """Return the bytes that a rule with default options keeps for a batch of float32 matrices; it allocates nothing.

    ``longest_basis`` is the length of the longest side that has a basis; None for the rule's default.

    >>> state_bytes("soap", (1, 4, 3)) == 4 * (2 * 4 * 3 + 2 * 4 * 4 + 2 * 3 * 3)
    True
    >>> state_bytes("soap", (1, 4, 3), 3) == 4 * (2 * 4 * 3 + 2 * 3 * 3)
    True
    """
    made = RULES[rule](**({} if longest_basis is None else {"max_precond_dim": longest_basis}))
    G = torch.empty(piece, device="meta")
    return sum(tensor.nbytes for tensor in laid_out(made, G).values())


def _hidden_layout(leaf: Leaf, others: Mapping[int, str]) -> tuple[Layout | None, str]:
    """Return the layout of a hidden matrix, or None for other parameters, and the reason."""
    for holds, why in REASONS:
        if holds(leaf):
            return None, why
    if id(leaf.param) in others:
        return None, others[id(leaf.param)]
    layout = find_layout(leaf)
    if layout is None:
        return None, _why_no_layout(leaf)
    if all(min(m, n) == 1 for _, m, n in layout.view.pieces):
        return None, f"vectors ({layout})"
    return layout, layout.why


def adjusted(leaf: Leaf, layout: Layout, view_options: Mapping[str, Any]) -> Layout:
    """Return a layout with options of the view that the user has set."""
    try:
        plain = {name: StackOptions.kind(name).read(name, value) for name, value in view_options.items()}
        return Layout(replace(layout.view, **plain), layout.why)
    except ValueError as error:
        raise ValueError(f"{leaf.name}: {error}") from error


def _why_no_layout(leaf: Leaf) -> str:
    """Return why a parameter that no detector recognizes is optimized entry by entry."""
    if leaf.param.numel() == 0:
        return "placeholder without its shape"
    is_table = any(TABLE_NAMES.search(name) for name in leaf.last_names)
    return "learnt table: added, not multiplied" if is_table else UNKNOWN


def _matches(key: Key, leaf: Leaf) -> bool:
    if isinstance(key, str):
        return any(fnmatchcase(place.name, key) for place in leaf.places)
    return any(isinstance(module, key) for place in leaf.places for module in place.path)


def _spares(leaf: Leaf, settings: Mapping[str, Any]) -> bool:
    """Return whether settings for matrices meet a vector: ``{nn.Linear: "soap"}`` means the weights, not the biases."""
    for_matrices = is_matrix_rule(settings["rule"]) if "rule" in settings else not settings.keys().isdisjoint(OPTIONS)
    return for_matrices and leaf.is_vector


def _no_match(key: Key, matched: Sequence[Leaf], leaves: Sequence[Leaf]) -> str:
    shown = repr(key) if isinstance(key, str) else key.__name__
    if any(leaf.param.requires_grad for leaf in matched):
        return f"override {shown} is about matrices and matches vectors only, such as {matched[0].name!r}"
    if matched:
        return f"override {shown} matches frozen parameters only: {matched[0].name!r} doesn't require grad"
    if isinstance(key, str):
        names = [place.name for leaf in leaves for place in leaf.places]
        near = get_close_matches(key, names, n=1, cutoff=0.0)
        return f"override {shown} matches no parameter; the nearest is {near[0]!r}" if near else "the model is empty"
    kinds = sorted({leaf.kind for leaf in leaves})
    return f"override {shown} matches no parameter; modules with parameters are {', '.join(kinds)}"
