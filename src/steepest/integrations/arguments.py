"""What hosts pass to every optimizer, sorted: for matrices, for all other parameters, or for nobody."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from steepest.engine.group import UNSUPPORTED, option_defaults, plain_options
from steepest.optimizers import NAMES, group_options
from steepest.recipes import unfold_elementwise
from steepest.routing.classify import is_matrix_rule
from steepest.rule import nearest
from steepest.rules.aliases import ALIASES

ADAMS = ("betas", "eps")
"""Options that hosts mean as Adam's. Some rules have others of these names: Muon's ``eps`` guards a norm."""
IGNORED = ("betas", "eps", "momentum", "dampening", "nesterov", "foreach", "fused", "capturable", "amsgrad")
"""Arguments that hosts pass to everybody, and that may mean nothing here."""


def literal(value: Any) -> Any:
    """Return what a string spells, a number, a tuple, a bool or None; other strings, and other values, as they are.

    >>> [literal(value) for value in ("3e-3", "(0.9, 0.95)", "True", "qr", 0.1)]
    [0.003, (0.9, 0.95), True, 'qr', 0.1]
    """
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(value)
    return value


def literals(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose strings, as command lines have them, are numbers, tuples and bools where they spell some."""
    return {name: literal(value) for name, value in options.items()}


def sort(
    name: str, elementwise: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the options of matrices, ``rule`` among them, those of all other parameters, and what to say about it.

    Args:
        name: The optimizer of matrices, or a recipe.
        elementwise: The options of the other parameters, which take precedence for these.
        options: What the host passes.

    Raises:
        ValueError: For a name that nobody has, and for an option that neither has and that hosts don't pass to
            everybody.

    >>> matrices, rest, notes = sort("muon", {}, {"betas": (0.9, 0.95), "momentum": 0.9, "foreach": None})
    >>> matrices, rest
    ({'rule': 'muon', 'momentum': 0.9}, {'betas': (0.9, 0.95), 'rule': 'adamw'})
    >>> notes
    ['betas=(0.9, 0.95) goes to adamw: muon has no betas']
    """
    rule = rule_of(name)
    entrywise = unfold_elementwise(name, literals(elementwise))
    entrywise = group_options(entrywise.pop("rule", "adamw"), entrywise)
    known, others = option_defaults(rule), option_defaults(entrywise["rule"])
    mine, theirs, notes = {}, {}, []
    for key, value in literals(options).items():
        if key in UNSUPPORTED:
            if value:
                raise ValueError(f"{key}={value!r}: not supported; {UNSUPPORTED[key]}")
            continue
        there = is_matrix_rule(rule) and key in ADAMS and key in others
        if there:
            theirs[key] = value
        if takes(rule, key):
            mine[key] = value
        elif there:
            has = f"{rule} keeps its own, {known[key]!r}" if key in known else f"{rule} has no {key}"
            notes.append(f"{key}={value!r} goes to {entrywise['rule']}: {has}")
        elif key not in IGNORED:
            raise ValueError(f"{key}={value!r}: {rule} has no such option{nearest(key, [*known, *ALIASES])}")
        elif value is not None:
            notes.append(f"{key}={value!r} is ignored: {rule} has no such option")
    matrices, rest = group_options(name, mine), theirs | entrywise
    for settings in (matrices, rest):  # here, too, since there may be no parameter for one of them
        defaults = option_defaults(settings["rule"])
        plain_options(defaults | {"lr": 0.0} | {key: settings[key] for key in settings.keys() & defaults.keys()})
    return matrices, rest, notes


def rule_of(name: object) -> str:
    """Return the rule of an optimizer or a recipe; where there is none, say which optimizers there are.

    >>> rule_of("KL_SOAP")
    'kl_soap'
    >>> rule_of("adafactor")
    Traceback (most recent call last):
    ValueError: name='adafactor': no such rule; there are soap, kl-soap, rekls, ..., lion and adamw, and recipes
    """
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: must be the name of an optimizer, such as 'soap'")
    try:
        return str(group_options(name, {})["rule"])
    except ValueError as error:
        raise ValueError(f"{error}; there are {', '.join(NAMES)} and adamw, and recipes") from None


def takes(rule: str, key: str) -> bool:
    """Return whether an option that a host passes means a rule's own of that name."""
    known = option_defaults(rule)
    if key == "eps" and is_matrix_rule(rule):
        return bool(known.get(key) == option_defaults("adamw")[key])
    return key in known or key in ALIASES
