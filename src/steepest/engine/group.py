"""The options of a parameter group: those of the engine and those of its rule, their defaults, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steepest.rule import Rule, check, check_choice, nearest
from steepest.rules import RULES
from steepest.view import OPTIONS as VIEW_OPTIONS

DECAY_METHODS = ("decoupled", "independent", "palm", "cautious", "l2")
OPTIONS: dict[str, Any] = {
    "lr": None,
    "weight_decay": 0.01,
    "nonfinite": "skip",
    "stochastic_rounding": False,
    "rounding_seed": 0,
}
"""The options of every group, whatever its rule."""
STACK_OPTIONS: dict[str, Any] = {
    "weight_decay_method": "decoupled",
    "stagger": False,
    "compile": False,
    "cuda_graph": False,
    "block_size": 0,
    **VIEW_OPTIONS,
}
"""The further options of groups whose rule steps matrices."""


def option_defaults(rule: str) -> dict[str, Any]:
    """Return every option of a group under ``rule``, those of the engine and those of the rule, with its default.

    Raises:
        ValueError: for a rule that does not exist; the message names the nearest one.

    >>> option_defaults("adamw")["betas"]
    (0.9, 0.999)
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: no such rule{nearest(rule, RULES)}")
    engine = OPTIONS | (STACK_OPTIONS if issubclass(RULES[rule], Rule) else {})
    return {"rule": rule} | engine | RULES[rule].defaults()


def check_options(group: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option of a group that is out of range."""
    lr, wd, seed = group["lr"], group["weight_decay"], group["rounding_seed"]
    if lr is None:
        raise ValueError("lr=None: a group needs a learning rate, of its own or from the optimizer")
    check(isinstance(lr, Tensor) or lr >= 0, "lr", lr, "a number >= 0")
    check(not isinstance(lr, Tensor) or lr.numel() == 1, "lr", lr, "a number, or a tensor of one element")
    check(wd >= 0, "weight_decay", wd, "a number >= 0")
    check_choice("nonfinite", group["nonfinite"], ("skip", "raise"))
    check(isinstance(group["stochastic_rounding"], bool), "stochastic_rounding", group["stochastic_rounding"], "a bool")
    check(isinstance(seed, int) and not isinstance(seed, bool), "rounding_seed", seed, "an integer")
    if "weight_decay_method" in group:
        check_choice("weight_decay_method", group["weight_decay_method"], DECAY_METHODS)
    for name in ("compile", "cuda_graph"):
        check(isinstance(group.get(name, False), bool), name, group.get(name), "a bool")
    RULES[group["rule"]].from_group(group)
