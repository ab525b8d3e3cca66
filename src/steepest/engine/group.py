"""The options of a parameter group: those of the engine and those of its rule, their defaults, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.exchange.foreign import refuse_flat
from steepest.exchange.shards import local
from steepest.rule import Rule, State, check, check_choice, nearest
from steepest.rules import RULES
from steepest.stack.names import parameter_names
from steepest.stack.stack import ranges
from steepest.view import OPTIONS as VIEW_OPTIONS
from steepest.view import View

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
MOST_LINES = 8
"""The most lines that `describe` has for groups."""


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
    for name in option_defaults(group["rule"]):
        if name not in group:
            raise ValueError(f"a parameter group has no {name!r}, which {group['rule']} needs: put it back")
    lr, wd, seed = group["lr"], group["weight_decay"], group["rounding_seed"]
    if lr is None:
        raise ValueError("lr=None: a group needs a learning rate, of its own or from the optimizer")
    check(isinstance(lr, Tensor) or lr >= 0, "lr", lr, "a number >= 0")
    check(not isinstance(lr, Tensor) or lr.numel() == 1, "lr", lr, "a number, or a tensor of one element")
    check(wd >= 0, "weight_decay", wd, "a number >= 0")
    check_choice("nonfinite", group["nonfinite"], ("skip", "raise"))
    check(isinstance(seed, int) and not isinstance(seed, bool), "rounding_seed", seed, "an integer")
    if "weight_decay_method" in group:
        check_choice("weight_decay_method", group["weight_decay_method"], DECAY_METHODS)
    for name in ("stochastic_rounding", "stagger", "compile", "cuda_graph", "merge_dims", "transpose"):
        check(isinstance(group.get(name, False), bool), name, group.get(name), "a bool")
    RULES[group["rule"]].from_group(group)


def check_parameter(name: str, p: Tensor, group: Mapping[str, Any], dims: int = 0) -> None:
    """Raise unless a parameter, which had ``dims`` dimensions before, can be optimized under its group's options."""
    if not p.is_floating_point():
        raise ValueError(f"{name} of dtype {p.dtype}: only real floating-point parameters can be optimized")
    if issubclass(RULES[group["rule"]], Rule):
        View.of(p, group)
        refuse_flat(p, name, group["rule"], dims)


def check_parameters(groups: Sequence[Mapping[str, Any]], dims: Sequence[int]) -> None:
    """Raise unless all parameters can be optimized, and each stands in one place, with a gradient of its shape.

    ``dims`` has the number of dimensions that each had before.
    """
    params = [(p, group) for group in groups for p in group["params"]]
    places: set[Tensor] = set()
    for (p, group), name, before in zip(params, parameter_names(groups), dims, strict=True):
        check_parameter(name, p, group, before)
        if p in places:
            raise ValueError(f"{name} is in the parameter groups twice: take it out of one place")
        if p.grad is not None and p.grad.shape != p.shape:
            raise ValueError(
                f"{name} has shape {list(p.shape)}, and its gradient {list(p.grad.shape)}: set it to None, and let "
                "backward make it anew"
            )
        places.add(p)


def describe(name: str, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, State]) -> str:
    """Describe an optimizer: a line for each group, or for several groups that have the same options.

    A line has the rule, the learning rate, the options that differ from their defaults, the number of parameters and of
    their entries, and the bytes of state on this rank.
    """
    alike: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        defaults = option_defaults(group["rule"])
        del defaults["rule"], defaults["lr"]
        changed = {k: group[k] for k, default in defaults.items() if repr(group.get(k, default)) != repr(default)}
        words = [group["rule"], *(f"{k}={value!r}" for k, value in ({"lr": group["lr"]} | changed).items())]
        alike.setdefault(", ".join(words), []).append(number)
    lines = []
    for options, numbers in alike.items():
        params = [p for number in numbers for p in groups[number]["params"]]
        entries = sum(p.numel() for p in params)
        nbytes = sum(local(x).nbytes for p in params for x in state.get(p, {}).values())
        counts = [_count(len(params), "parameter"), _count(entries, "entry", "entries"), f"{nbytes:,} bytes of state"]
        which = [str(r.start) if r.stop == r.start + 1 else f"{r.start}-{r.stop - 1}" for r in ranges(numbers)]
        lines.append(f"  group{'s' * (len(numbers) > 1)} {', '.join(which)}: {', '.join([options, *counts])}")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"  ... and {len(lines) - MOST_LINES} more kinds of groups"]
    return "\n".join([f"{name}(", *lines, ")"])


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
