"""The classification of a parameter: which rule optimizes it, as which matrices, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from steepest.routing.layout import Layout, find_layout
from steepest.routing.overrides import is_matrix_rule
from steepest.routing.reasons import REASONS, is_bias, is_norm, is_vector, why_no_layout
from steepest.routing.survey import Leaf
from steepest.routing.table import Row
from steepest.rule import Rule
from steepest.rules import RULES
from steepest.rules.aliases import resolve
from steepest.stack.storage import laid_out
from steepest.view import OPTIONS, View


def classify(leaf: Leaf, rule: str, elementwise: str, heads: Mapping[int, str], override: Mapping[str, Any]) -> Row:
    """Return the row of a parameter: by ``rule`` if it is a hidden matrix, else by ``elementwise``, or as overridden.

    ``heads`` are the ids of output heads, with how they were found; ``override`` holds the user's options.
    """
    layout, why = _hidden_layout(leaf, heads)
    hidden = layout is not None
    options = resolve({"rule": rule if hidden else elementwise, **override})
    rule = options.pop("rule")
    view_options = {name: options.pop(name) for name in OPTIONS if name in options}
    if is_matrix_rule(rule):
        layout = layout or find_layout(leaf.place) or Layout(View(tuple(leaf.param.shape)))
        layout = _adjusted(leaf, layout, view_options) if view_options else layout
        hidden = True
    elif view_options:
        raise ValueError(f"{leaf.name}: {', '.join(view_options)} mean nothing to {rule}, which works entry by entry")
    else:
        layout = None
        hidden = hidden and "rule" not in override
    return Row(
        name=leaf.name,
        param=leaf.param,
        rule=rule,
        view=layout.view if layout else None,
        layout=str(layout) if layout else "×".join(map(str, leaf.param.shape)) or "scalar",
        why=f"override (else {why})" if override else why,
        state_bytes=state_bytes(rule, layout.view.pieces if layout else [(1, 1, leaf.param.numel())]),
        hidden=hidden,
        decays=not (is_vector(leaf) or is_norm(leaf) or is_bias(leaf)),
        options=options,
    )


def state_bytes(rule: str, pieces: Sequence[tuple[int, int, int]]) -> int:
    """Return the bytes that a rule with default options keeps for float32 matrices of these shapes ``(b, m, n)``.

    Nothing is allocated.

    >>> state_bytes("soap", [(1, 4, 3)]) == 4 * (2 * 4 * 3 + 2 * 4 * 4 + 2 * 3 * 3)
    True
    """
    return sum(_piece_bytes(rule, tuple(piece)) for piece in pieces)


@cache
def _piece_bytes(name: str, piece: tuple[int, int, int]) -> int:
    rule = RULES[name]()
    G = torch.empty(piece, device="meta")
    state = laid_out(rule, G) if isinstance(rule, Rule) else rule.init(G)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _hidden_layout(leaf: Leaf, heads: Mapping[int, str]) -> tuple[Layout | None, str]:
    """Return the layout of a hidden matrix, or None for other parameters, and the reason."""
    for holds, why in REASONS:
        if holds(leaf):
            return None, why
    if id(leaf.param) in heads:
        return None, heads[id(leaf.param)]
    layout = find_layout(leaf.place)
    if layout is None:
        return None, why_no_layout(leaf)
    if all(min(m, n) == 1 for _, m, n in layout.view.pieces):
        return None, f"vectors ({layout})"
    return layout, layout.why


def _adjusted(leaf: Leaf, layout: Layout, view_options: Mapping[str, Any]) -> Layout:
    try:
        return Layout(replace(layout.view, **view_options), layout.why)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{leaf.name}: {error}") from error
