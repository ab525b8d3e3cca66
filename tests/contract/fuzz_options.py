"""What is drawn for tests/contract/test_fuzz.py: shapes of parameters, options of groups, and values for them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import torch
from hypothesis import strategies as st
from torch import Tensor

from steepest.engine.group import option_defaults
from steepest.rule import Elementwise
from steepest.rules import RULES
from steepest.schedules import LinearSchedule

Options = dict[str, Any]
Shape = tuple[int, ...]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


ALIGNED: list[Shape] = [(16, 16), (16, 32), (32, 16), (16,), (), (16, 4, 2, 2), (2, 16, 16)]
"""Matrices of these shapes have the same bits in any stack."""
MISALIGNED: list[Shape] = [(3, 3), (2, 3), (3,), (3, 1, 2, 1), (4, 2, 2)]
"""These may differ in their last bits, see docs/many-gpus.md. No side exceeds the other by more than one: the null
space of a first covariance has one dimension then, so that its basis is no matter of rounding."""
SHAPES = st.sampled_from(ALIGNED + MISALIGNED)
VIEWS = [{}, {"merge_dims": False}, {"block_size": 16}, {"transpose": True}]
LAYOUTS = {
    "precondition_1d": [True],
    "max_precond_dim": [0, 16],
    "graft": ["none", "sgd", "rmsprop"],
    "axis": ["columns"],
    "inner": ["rmsprop"],
    "rank_fraction": [0.5, 1.0],
    "amsgrad": [True],
    "moment_dtype": ["int8"],
    "basis_dtype": ["bfloat16"],
    "form": ["eigen"],
    "bias": [],  # of the layer, which bare parameters don't have
}
"""Options of rules that lay state out, with values that are no defaults."""


def layouts(rule: str) -> list[Options]:
    """The options that lay state out, as a few sets of them, the defaults first."""
    of_rule = [{name: value} for name in RULES[rule].layout_options() for value in LAYOUTS[name]]
    views = VIEWS if not issubclass(RULES[rule], Elementwise) else VIEWS[:1]
    return [*views, *of_rule, *({**view, **of_rule[0]} for view in views[1:] if of_rule)]


def changes(rule: str, named: bool) -> dict[str, list[Any]]:
    """Values of the options that may change while there is state."""
    found: dict[str, list[Any]] = {
        "lr": [0.1, 0.01, 0.0, torch.tensor(0.03)],
        "weight_decay": [0.0, 0.1],
        "nonfinite": ["skip", "raise"],
    }
    if named:  # whose noise is the same wherever the parameter stands
        found |= {"stochastic_rounding": [False, True], "rounding_seed": [0, 7]}
    if not issubclass(RULES[rule], Elementwise):
        found["weight_decay_method"] = ["decoupled", "independent", "palm", "cautious", "l2"]
    hints = get_type_hints(RULES[rule])
    for f in fields(RULES[rule]):
        if f.name not in RULES[rule].layout_options():
            found[f.name] = [f.default, *_others(hints[f.name], f.default)]
    if "ns_dtype" in found:
        found["ns_dtype"] = ["float32", "bfloat16"]  # and not "auto", which is settled where a group is new
    found.pop("kl_clip", None)
    if "precondition_frequency" in found:
        found["precondition_frequency"] += [2, 3, LinearSchedule(1, 3, 4)]
    return found


def _others(hint: Any, default: Any) -> list[Any]:
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, tuple):
        return [(0.5, 0.9), (0.0, 0.99)]
    if isinstance(default, int):
        return [default + 1, default + 2]
    if isinstance(default, float):
        return [default / 2, 0.5]
    return [word for word in get_args(hint) if isinstance(word, str)]


def valid(options: Options) -> bool:
    """Whether the options of a group, each of which may be allowed, are allowed together."""
    try:
        RULES[options["rule"]].from_group(options)
    except ValueError:
        return False
    return True


BAD: dict[str, list[Any]] = {
    "lr": [float("nan"), -0.1, None],
    "weight_decay": [float("nan"), -1.0],
    "nonfinite": ["ignore"],
    "betas": [(0.9, 1.0), 0.9],
    "eps": [-1.0, "small", float("nan")],
    "momentum": [1.0, None],
    "precondition_frequency": [0, 1.5, "often"],
    "weight_decay_method": ["none"],
    "stagger": ["yes"],
}
"""Values that are out of range."""


def exact(shape: Iterable[int], options: Options) -> bool:
    """Whether the bits are promised to be the same; where they aren't, weights are float64, which hides rounding."""
    return tuple(shape) in ALIGNED and options["rule"] not in ("dion", "dion2")


def draw(shape: Iterable[int], *seeds: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seeds alone."""
    seed = zlib.crc32(repr(seeds).encode())
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def group_options(draw: st.DrawFn, rules: Iterable[str] = tuple(RULES)) -> Options:
    """A rule, and options of a group under it that differ from the defaults."""
    rule = draw(st.sampled_from(sorted(rules)))
    options = {"rule": rule} | draw(st.sampled_from(layouts(rule))) | {"lr": 0.05, "weight_decay": 0.1}
    known = changes(rule, named=False)
    if "ns_dtype" in known:
        options["ns_dtype"] = "float32"
    for name in draw(st.sets(st.sampled_from(sorted(known)), max_size=3)):
        new = {name: draw(st.sampled_from(known[name]))}
        options |= new if valid(option_defaults(rule) | options | new) else {}
    return options
