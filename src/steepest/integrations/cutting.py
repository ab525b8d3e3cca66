"""A host's parameter groups, cut into groups of one rule each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from steepest.engine.group import listed, option_defaults
from steepest.exchange.foreign import refuse_flat
from steepest.integrations.arguments import literals, takes
from steepest.integrations.names import skeleton
from steepest.integrations.shapes import rows as rows_by_shape
from steepest.optimizers.shared import Params
from steepest.routing.classify import Overrides, is_matrix_rule
from steepest.routing.deciding import route
from steepest.routing.table import Routing, Row

SCALES = ("lr_scale", "lr_mult", "wd_mult")
"""Entries of groups by which a host's scheduler multiplies what it writes there."""
OF_GROUPS = ("params", "param_names", "rule")


@dataclass(frozen=True)
class Cut:
    """What became of a host's groups."""

    groups: list[dict[str, Any]]
    routing: Routing
    notes: list[str]


@dataclass(frozen=True)
class Member:
    """A parameter in a host's groups."""

    group: int
    name: str | None
    param: Tensor


def as_groups(params: Params | Tensor) -> list[dict[str, Any]]:
    """Return parameters as torch.optim takes them as groups, whose ``params`` are lists.

    >>> p = nn.Parameter(torch.zeros(2))
    >>> as_groups(iter([p])) == as_groups([{"params": p}]) == [{"params": [p]}]
    True
    """
    items = listed(params)
    groups = [dict(item) for item in items if isinstance(item, dict)] or [{"params": items}]
    return [{**group, "params": listed(group["params"])} for group in groups]


def cut(
    groups: Sequence[Mapping[str, Any]],
    matrices: Mapping[str, Any],
    rest: Mapping[str, Any],
    overrides: Overrides | None = None,
) -> Cut:
    """Cut groups, in their order, into groups of one rule; those that name a rule stay as they are.

    Args:
        groups: The host's groups, as `as_groups` returns them.
        matrices: The options of matrices, ``rule`` among them.
        rest: Those of all other parameters.
        overrides: As in `steepest.route`, for parameters with names.

    Raises:
        ValueError: If there are overrides, and parameters without names; or if there is to be a matrix rule, and
            FSDP1 or DeepSpeed's ZeRO have cut a parameter into flat parts.
    """
    rule = matrices["rule"]
    elementwise = rest["rule"] if is_matrix_rule(rule) else rule
    members = [
        member for number, group in enumerate(groups) if "rule" not in group for member in _members(number, group)
    ]
    for place, member in enumerate(members):
        if is_matrix_rule(rule) and not _is_fallback(groups[member.group]):
            refuse_flat(member.param, member.name or f"parameter {place}", rule)
    named = bool(members) and all(member.name is not None for member in members)
    if named:
        rows, warnings = _rows_by_name(members, groups, rule, elementwise, overrides or {})
    else:
        if overrides:
            raise ValueError(
                f"overrides={dict(overrides)!r}: the parameters have no names: give (name, parameter) pairs, or use "
                "steepest.for_model(model, ...)"
            )
        rows, warnings = _rows_by_shape(members, groups, rule, elementwise)
    by_id = {id(row.param): row for row in rows}
    made: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        if "rule" in group:
            made.append(dict(group))
            continue
        its_rows = tuple(by_id[id(member.param)] for member in members if member.group == number)
        made += _cut(group, Routing(its_rows, (), rule, elementwise), matrices, rest, named)
    present = [name for name in SCALES if any(name in group for group in groups)]
    notes = (
        [f"{' and '.join(present)} of groups: kept for the host's scheduler, which multiplies by it"] if present else []
    )
    return Cut(made, Routing(tuple(rows), tuple(warnings), rule, elementwise), notes)


def _members(number: int, group: Mapping[str, Any]) -> list[Member]:
    names: Iterable[str | None] = group.get("param_names") or [None] * len(group["params"])
    pairs = [
        item if isinstance(item, tuple) else (name, item) for item, name in zip(group["params"], names, strict=True)
    ]
    for _, p in pairs:
        if not isinstance(p, Tensor):
            raise TypeError(f"optimizer can only optimize Tensors, but one of the params is {type(p).__name__}")
    return [Member(number, name, p) for name, p in pairs]


def _rows_by_name(
    members: Sequence[Member],
    groups: Sequence[Mapping[str, Any]],
    rule: str,
    elementwise: str,
    overrides: Overrides,
) -> tuple[list[Row], list[str]]:
    """Return the rows of parameters with names, in modules that stand in for the model's, and warnings."""
    counts = Counter(member.name for member in members)
    names = [f"{m.group}.{m.name}" if counts[m.name] > 1 else str(m.name) for m in members]
    # On the meta device nothing is held twice, and frozen parameters, which may thaw, can be routed, too.
    standing = [nn.Parameter(torch.empty(m.param.shape, dtype=m.param.dtype, device="meta")) for m in members]
    fallback = [name for name, m in zip(names, members, strict=True) if _is_fallback(groups[m.group])]
    routing = route(
        skeleton(dict(zip(names, standing, strict=True))),
        rule,
        elementwise=elementwise,
        overrides={**dict.fromkeys(fallback, elementwise), **overrides},
    )
    whose = {id(p): member for p, member in zip(standing, members, strict=True)}
    rows = [replace(row, param=whose[id(row.param)].param, name=str(whose[id(row.param)].name)) for row in routing.rows]
    # A tied head has no name of its own in an optimizer, so it isn't missed where there is an embedding.
    tied = ("no output head",) if any("embedding" in row.why for row in rows) else ()
    return rows, [text for text in routing.warnings if not any(word in text for word in ("meta device", *tied))]


def _rows_by_shape(
    members: Sequence[Member], groups: Sequence[Mapping[str, Any]], rule: str, elementwise: str
) -> tuple[list[Row], list[str]]:
    """Return the rows of parameters without names, and warnings."""
    several, seen = len(groups) > 1, Counter[int]()
    names = []
    for member in members:
        place = f"params.{seen[member.group]}"
        names.append(f"groups.{member.group}.{place}" if several else place)
        seen[member.group] += 1
    decays = [literals(group).get("weight_decay") for group in groups]
    exempt = {i for i, decay in enumerate(decays) if decay == 0 and any(decays)}
    entrywise = {i for i, m in enumerate(members) if m.group in exempt or _is_fallback(groups[m.group])}
    rows, doubtful = rows_by_shape([m.param for m in members], names, rule, elementwise, entrywise)
    lost = [
        f"no parameter goes to {rule}: there are vectors only; if they are flat parts of matrices, shard with FSDP2 "
        "(torch.distributed.fsdp.fully_shard), which keeps those"
    ]
    only_vectors = is_matrix_rule(rule) and bool(members) and all(m.param.dim() < 2 for m in members)
    if not doubtful:
        return rows, lost if only_vectors else []
    by_name = {row.name: row for row in rows}
    guesses = ", ".join(f"{name} ({by_name[name].layout}) to {by_name[name].rule}" for name in doubtful[:3])
    more = f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""
    return rows, [
        f"guessed by shape alone: {guesses}{more}; give (name, parameter) pairs, or use "
        "steepest.for_model(model, ...), which sees the modules"
    ]


def _is_fallback(group: Mapping[str, Any]) -> bool:
    return bool(group.get("use_fallback"))


def _cut(
    group: Mapping[str, Any], routing: Routing, matrices: Mapping[str, Any], rest: Mapping[str, Any], named: bool
) -> list[dict[str, Any]]:
    """Return the groups that one of the host's becomes."""
    mine = {key: value for key, value in matrices.items() if key != "rule"}
    theirs = {key: value for key, value in rest.items() if key != "rule"}
    own, others, extras = _sorted(group, routing.rule, routing.elementwise)
    for key in ("lr", "weight_decay"):
        if key in own and key in theirs:
            theirs[key] = _in_proportion(own[key], theirs[key], mine.get(key)) if key == "lr" else own[key]
    made = routing.groups(mine | own, theirs | others, decay_1d="weight_decay" in own)
    for each in made:
        if not named:
            each["params"] = [p for _, p in each["params"]]
    return [{**extras, **each} for each in made]


def _sorted(
    group: Mapping[str, Any], rule: str, elementwise: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the options that a group has for matrices, for the rest, and its other entries."""
    own, others, extras = {}, {}, {}
    options = literals({key: value for key, value in group.items() if key not in OF_GROUPS})
    for key, value in options.items():
        here, there = takes(rule, key), key in ("betas", "eps") and key in option_defaults(elementwise)
        if here:
            own[key] = value
        if there:
            others[key] = value
        if not here and not there:
            extras[key] = group[key]
    return own, others, extras


def _in_proportion(lr: Any, other: Any, to: Any) -> Any:
    """Return a learning rate that is to ``lr`` as ``other`` is to ``to``, where these are numbers."""
    numbers = all(isinstance(x, Real) for x in (lr, other, to))
    return lr * other / to if numbers and to else other
