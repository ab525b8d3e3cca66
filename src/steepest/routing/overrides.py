"""Overrides: a user's decisions on parameters, by name pattern or by module type."""

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
"""From a name pattern or a module type to an optimizer's name, or to options: ``rule``, ``lr``, a view's and others."""


def resolve(overrides: Overrides, leaves: Sequence[Leaf]) -> dict[int, dict[str, Any]]:
    """Return the overridden options of each parameter, by id.

    Later overrides change earlier ones, or replace them if they name a rule.

    >>> from steepest.routing.survey import survey
    >>> leaves = survey(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)))
    >>> list(resolve({nn.Linear: "soap", "1.weight": {"lr": 0.1}}, leaves).values())
    [{'rule': 'soap'}, {'rule': 'soap', 'lr': 0.1}]
    >>> resolve({"1.wieght": "adamw"}, leaves)
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


def _matches(key: Key, leaf: Leaf) -> bool:
    if isinstance(key, str):
        return any(fnmatchcase(place.name, key) for place in leaf.places)
    return any(isinstance(module, key) for place in leaf.places for module in place.path)


def _spares(leaf: Leaf, settings: Mapping[str, Any]) -> bool:
    """Return whether settings for matrices meet a vector: ``{nn.Linear: "soap"}`` means the weights, not the biases."""
    for_matrices = is_matrix_rule(settings["rule"]) if "rule" in settings else not settings.keys().isdisjoint(OPTIONS)
    return for_matrices and is_vector(leaf)


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
    kinds = sorted({leaf.place.kind for leaf in leaves})
    return f"override {shown} matches no parameter; modules with parameters are {', '.join(kinds)}"
