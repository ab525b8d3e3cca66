"""The options of a parameter group: those of the engine and those of its rule, their defaults, and their checks."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from torch import Tensor

from steepest.exchange.foreign import refuse_flat
from steepest.exchange.shards import local
from steepest.rule import (
    Options,
    Rule,
    State,
    any_integer,
    at_least,
    count_or_counts,
    counts,
    flag,
    nearest,
    one_of,
    rate,
)
from steepest.rule.words import DecayMethod, Nonfinite
from steepest.rules import RULES
from steepest.rules.aliases import ALIASES
from steepest.stack.names import parameter_names
from steepest.stack.stack import ranges
from steepest.stack.storage import Storage
from steepest.view import View


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Options):
    """The options of every group, whatever its rule."""

    lr: float | Tensor | None = rate(None)
    weight_decay: float = at_least(0, 0.01)
    nonfinite: Nonfinite = one_of(Nonfinite, "skip")
    stochastic_rounding: bool = flag(False)
    rounding_seed: int = any_integer(0)

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """As of every group, but nothing is remembered: rates change at every step, tensors even in place."""
        return cls(**{name: group[name] for name in cls.defaults() if name in group})


@dataclass(frozen=True, kw_only=True)
class StackOptions(Options):
    """The further options of groups whose rule steps matrices; the last four are those of `steepest.view`."""

    weight_decay_method: DecayMethod = one_of(DecayMethod, "decoupled")
    stagger: bool = flag(False)
    compile: bool = flag(False)
    cuda_graph: bool = flag(False)
    block_size: int = at_least(0, 0, "0 cuts nothing")
    merge_dims: bool = flag(True)
    transpose: bool = flag(False)
    split: tuple[int, ...] = counts(())
    heads: int | tuple[int, ...] = count_or_counts(1)


OPTIONS, STACK_OPTIONS = GroupOptions.defaults(), StackOptions.defaults()
TYPO = 0.85
"""The similarity from which on an unknown entry of a group counts as a misspelt option."""
UNSUPPORTED = {"maximize": "negate the loss", "differentiable": "steps have no gradient"}
"""Options of torch.optim that would change every step, and what to do instead."""
MOST_LINES = 8
"""The most lines that `describe` has for groups."""


def option_defaults(rule: str) -> dict[str, Any]:
    """Return every option of a group under ``rule``, those of the engine and those of the rule, with its default.

    Raises:
        ValueError: for a rule that does not exist; the message names the nearest one.

    >>> option_defaults("adamw")["betas"]
    (0.9, 0.999)
    """
    defaults = {"rule": rule}
    for kind in _kinds(rule):
        defaults |= kind.defaults()
    return defaults


def plain_options(group: Mapping[str, Any], changed: Collection[str] | None = None) -> dict[str, Any]:
    """Return every option of a group in its plain form: numbers, words, bools and tuples of Python.

    If only some entries have ``changed``, options that belong to none of them may be left out.

    Numbers of numpy, whole floats for integers, and numbers in strings, as YAML and command lines have them, are taken;
    a tensor is taken for ``lr`` only, and stays the same one. Its value is read, which waits for an accelerator. An
    option that the group lacks, as one of an older steepest may, has its default.

    Raises:
        ValueError: for an option that is not allowed, or that counts only where a group is made. It names the option,
            its value, and what is allowed.

    >>> group = option_defaults("adamw") | {"lr": "1e-3", "betas": [0.9, 0.95], "initial_lr": 0.1}
    >>> plain_options(group) == option_defaults("adamw") | {"lr": 0.001, "betas": (0.9, 0.95)}
    True
    >>> plain_options(group | {"amsgrad": "no"})
    Traceback (most recent call last):
    ValueError: amsgrad='no': must be a bool
    """
    if changed == {"lr"}:  # as a schedule changes it at every step, and all else was checked before
        return {"lr": GroupOptions.kind("lr").read("lr", group.get("lr"))}
    for name, remedy in ALIASES.items():
        if name in group:
            raise ValueError(f"{name}={group[name]!r}: counts only where a group is made; {remedy}")
    for name, remedy in UNSUPPORTED.items():
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r}: not supported; {remedy}")
    kinds = _kinds(group.get("rule"))
    plain: dict[str, Any] = {"rule": kinds[-1].name}
    for kind in kinds:
        if changed is None or not kind.defaults().keys().isdisjoint(changed):
            plain |= kind.from_group(group).as_dict()
    return plain


def check_names(group: Mapping[str, Any]) -> None:
    """Raise a ValueError for an entry of a new group that is meant as an option, and is none of the group's rule.

    Other entries may stay, as in torch: schedulers and trainers keep notes of their own in groups.

    >>> check_names({"rule": "muon", "lr_scale": 0.5, "initial_lr": 0.1})
    >>> check_names({"rule": "muon", "shampoo_beta": 0.9})
    Traceback (most recent call last):
    ValueError: shampoo_beta=0.9: muon has no such option
    """
    rule = group["rule"]
    known = option_defaults(rule)
    for name, value in group.items():
        if name in known or name in ("params", "param_names", "format"):
            continue
        if name in _all_options():
            raise ValueError(f"{name}={value!r}: {rule} has no such option")
        for near in difflib.get_close_matches(str(name), [*known, *ALIASES, "params"], n=1, cutoff=TYPO):
            if f"_{near}_" not in f"_{name}_":  # a longer name, such as no_weight_decay, is one of its own
                raise ValueError(f"{name}={value!r}: {rule} has no such option (did you mean {near!r}?)")


def listed(params: Any) -> list[Any]:
    """Return the parameters of a new group, tensors or ``(name, tensor)`` pairs, as a list.

    Raises:
        ValueError: for a parameter that is given twice.
        TypeError: for a set, as in torch.
    """
    if isinstance(params, set | frozenset):
        raise TypeError("params are a set, whose order differs from run to run: give a list")
    items = [params] if isinstance(params, Tensor) else list(params)
    names: dict[Tensor, str] = {}
    for i, item in enumerate(items):
        name, p = item if isinstance(item, tuple) else (f"parameter {i}", item)
        if not isinstance(p, Tensor):
            continue  # torch refuses it by its type
        if p in names:
            raise ValueError(f"{names[p]} and {name} are one parameter, of shape {list(p.shape)}: give it once")
        names[p] = name
    return items


@cache
def _all_options() -> set[str]:
    """Return the options of all rules, and their other names."""
    return {name for rule in RULES for name in option_defaults(rule)} | ALIASES.keys()


def _kinds(rule: Any) -> list[type[Options]]:
    """Return the classes that hold the options of a group under ``rule``."""
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule={rule!r}: no such rule{nearest(rule, RULES)}")
    return [GroupOptions, *([StackOptions] if issubclass(RULES[rule], Rule) else []), RULES[rule]]


def check_parameter(name: str, p: Tensor, group: Mapping[str, Any], dims: int = 0) -> None:
    """Raise unless a parameter, which had ``dims`` dimensions before, can be optimized under its group's options."""
    if not p.is_floating_point():
        raise ValueError(f"{name} of dtype {p.dtype}: only real floating-point parameters can be optimized")
    rule = RULES[group["rule"]]
    if issubclass(rule, Rule):
        View.of(p, group)
        refuse_flat(p, name, rule.name, dims)
    elif Storage.of(rule.from_group(group)) is not None:  # with a scale for each block of a row
        refuse_flat(p, name, f"{rule.name} with moment_dtype='int8'", dims)
        if local(p).shape[1:] != p.shape[1:]:
            raise ValueError(
                f"{name} of shape {list(p.shape)} is sharded within rows, and {rule.name} with moment_dtype='int8' "
                "needs whole rows: shard the first dimension, or set moment_dtype='float32' in its group"
            )


def refuse_uncaptured(name: str, rule: str) -> None:
    """Raise if a rule needs statistics of layers, in an optimizer that has none."""
    if issubclass(kind := RULES[rule], Rule) and kind.captures:
        raise ValueError(
            f"{name} under rule={rule!r}: it needs statistics of the model's layers, which parameters alone don't "
            f"have: use steepest.{rule.upper()}(model), or steepest.for_model(model, {rule!r})"
        )


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
