"""The verdict on one parameter: rules of thumb first, then a person's override."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from steepest.routing.overrides import is_matrix_rule
from steepest.routing.reasons import REASONS, is_bias, is_norm, is_vector, unrecognised
from steepest.routing.sight import Sight, see
from steepest.routing.survey import Leaf
from steepest.routing.table import Row
from steepest.rule import Rule
from steepest.rules import RULES
from steepest.stack.storage import laid_out
from steepest.view import OPTIONS, View

Pieces = Sequence[tuple[int, int, int]]
"""Shapes ``(b, m, n)`` of the batches of matrices that a parameter is seen as."""

StateBytes = Callable[[str, Pieces], int]


def state_bytes(rule: str, pieces: Pieces) -> int:
    """What a rule with its default options keeps for float32 matrices of these shapes; nothing is allocated.

    >>> state_bytes("soap", [(1, 4, 3)]) == 4 * (2 * 4 * 3 + 2 * 4 * 4 + 2 * 3 * 3)
    True
    """
    return sum(_piece_bytes(rule, tuple(piece)) for piece in pieces)


@cache
def _piece_bytes(name: str, piece: tuple[int, int, int]) -> int:
    rule = RULES[name]()
    ghost = torch.empty(piece, device="meta")
    state = laid_out(rule, ghost) if isinstance(rule, Rule) else rule.init(ghost)
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@dataclass(frozen=True)
class Judge:
    """What the rules of thumb need to know beside the parameter."""

    rule: str
    elementwise: str
    heads: Mapping[int, str]
    state_bytes: StateBytes = state_bytes

    def row(self, leaf: Leaf, override: Mapping[str, Any]) -> Row:
        """The verdict on a leaf."""
        sight, why = self.opinion(leaf)
        hidden = sight is not None
        options = dict(override)
        rule = options.pop("rule", self.rule if hidden else self.elementwise)
        chosen_view = {name: options.pop(name) for name in OPTIONS if name in options}
        if override:
            why = f"override (else {why})"
        if is_matrix_rule(rule):
            sight = _adjusted(leaf, sight or see(leaf.place) or _at_face_value(leaf), chosen_view)
        elif chosen_view:
            raise ValueError(
                f"{leaf.name}: {', '.join(chosen_view)} mean nothing to {rule}, which works entry by entry"
            )
        else:
            sight = None
        hidden = sight is not None or (hidden and "rule" not in override)
        pieces = sight.view.pieces if sight else [(1, 1, leaf.param.numel())]
        return Row(
            name=leaf.name,
            param=leaf.param,
            rule=rule,
            view=sight.view if sight else None,
            why=why,
            state_bytes=self.state_bytes(rule, pieces),
            hidden=hidden,
            decays=not (is_vector(leaf) or is_norm(leaf) or is_bias(leaf)),
            options=options,
            seen=str(sight) if sight else "–",
        )

    def opinion(self, leaf: Leaf) -> tuple[Sight | None, str]:
        """How a hidden matrix is seen, or None for anything else; and why."""
        for holds, why in REASONS:
            if holds(leaf):
                return None, why
        if id(leaf.param) in self.heads:
            return None, self.heads[id(leaf.param)]
        sight = see(leaf.place)
        if sight is None:
            return None, unrecognised(leaf)
        if all(min(m, n) == 1 for _, m, n in sight.view.pieces):
            return None, f"vectors ({sight})"
        return sight, sight.why


def _at_face_value(leaf: Leaf) -> Sight:
    """What an override may send to a matrix rule although nothing says that it is a matrix."""
    return Sight(View(tuple(leaf.param.shape)), "")


def _adjusted(leaf: Leaf, sight: Sight, chosen: Mapping[str, Any]) -> Sight:
    if not chosen:
        return sight
    try:
        return replace(sight, view=replace(sight.view, **chosen), blocks="", members="")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{leaf.name}: {error}") from error
