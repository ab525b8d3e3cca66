"""A person's word against the rules of thumb: overrides by module type or by name pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from steepest.optimizers import group_options
from steepest.routing.reasons import is_vector
from steepest.routing.survey import Leaf
from steepest.rule import Rule
from steepest.rules import RULES
from steepest.view import OPTIONS

Key = str | type[nn.Module]
Overrides = Mapping[Key, str | Mapping[str, Any]]
"""Pattern or module type to an optimizer's name, or to options, among them ``rule``, ``lr`` and the view's."""


def resolve(overrides: Overrides, leaves: Sequence[Leaf]) -> dict[int, dict[str, Any]]:
    """What the overrides say about each parameter, by id; later ones change or, naming a rule, replace earlier ones.

    >>> from steepest.routing.survey import survey
    >>> leaves = survey(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    >>> list(resolve({nn.Linear: "soap", "1.weight": {"lr": 0.1}}, leaves).values())
    [{'rule': 'soap'}, {'rule': 'soap', 'lr': 0.1}]
    >>> resolve({"1.wieght": "adamw"}, leaves)
    Traceback (most recent call last):
    ValueError: override '1.wieght' matches no parameter; the nearest is '1.weight'
    """
    said: dict[int, dict[str, Any]] = {}
    for key, value in overrides.items():
        settings = {"rule": value} if isinstance(value, str) else dict(value)
        if "rule" in settings:
            settings = group_options(settings.pop("rule"), settings)
        matched = [leaf for leaf in leaves if matches(key, leaf)]
        taken = [leaf for leaf in matched if leaf.param.requires_grad and not _left_alone(leaf, settings)]
        if not taken:
            raise ValueError(_missed(key, matched, leaves))
        for leaf in taken:
            before = {} if "rule" in settings else said.get(id(leaf.param), {})  # options belong to their rule
            said[id(leaf.param)] = before | settings
    return said


def matches(key: Key, leaf: Leaf) -> bool:
    """Whether one of the parameter's names fits the pattern, or a module around it is of the type."""
    if isinstance(key, str):
        return any(fnmatchcase(place.name, key) for place in leaf.places)
    return any(isinstance(module, key) for place in leaf.places for module in place.path)


def is_matrix_rule(name: str) -> bool:
    """Whether the rule takes matrices, rather than entries."""
    return issubclass(RULES[name], Rule)


def _left_alone(leaf: Leaf, settings: Mapping[str, Any]) -> bool:
    """``{nn.Linear: "soap"}`` is about the weights: matrix rules and views can do nothing for the biases."""
    about_matrices = is_matrix_rule(settings["rule"]) if "rule" in settings else not settings.keys().isdisjoint(OPTIONS)
    return about_matrices and is_vector(leaf)


def _missed(key: Key, matched: Sequence[Leaf], leaves: Sequence[Leaf]) -> str:
    if any(leaf.param.requires_grad for leaf in matched):
        return f"override {_shown(key)} is about matrices and matches vectors only, such as {matched[0].name!r}"
    if matched:
        return f"override {_shown(key)} matches frozen parameters only: {matched[0].name!r} doesn't require grad"
    if isinstance(key, str):
        names = [place.name for leaf in leaves for place in leaf.places]
        near = get_close_matches(key, names, n=1, cutoff=0.0)
        return f"override {key!r} matches no parameter; the nearest is {near[0]!r}" if near else "the model is empty"
    kinds = sorted({leaf.place.kind for leaf in leaves})
    return f"override {_shown(key)} matches no parameter; they are held by {', '.join(kinds)}"


def _shown(key: Key) -> str:
    return repr(key) if isinstance(key, str) else key.__name__
