"""Routing for rules that are fed by statistics: every layer that can be captured, heads too, with its bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from steepest.curvature.layer import Layer, layers, unsupported
from steepest.routing.classify import adjusted, classify, state_bytes
from steepest.routing.layout import Layout
from steepest.routing.survey import Leaf
from steepest.routing.table import Row
from steepest.rule import Rule
from steepest.rules import RULES
from steepest.rules.aliases import resolve
from steepest.view import OPTIONS, View


def captures(rule: str) -> bool:
    """Return whether a rule is fed by statistics of layers.

    >>> captures("kfac"), captures("soap"), captures("adamw")
    (True, False, False)
    """
    return issubclass(kind := RULES[rule], Rule) and kind.captures


def captured_rows(
    model: nn.Module,
    leaves: Sequence[Leaf],
    rule: str,
    elementwise: str,
    overrides: Mapping[int, Mapping[str, Any]],
    longest: int,
) -> tuple[Row, ...]:
    """Return the rows of a model's trainable parameters.

    Args:
        model: the model.
        leaves: its trainable parameters.
        rule: a rule that captures.
        elementwise: the rule of parameters that can't be captured.
        overrides: the user's options, by the id of the parameter.
        longest: the longest side that has a factor.

    Raises:
        ValueError: if an override sends a parameter to a rule that captures, and it can't be captured.
    """
    by_weight = {layer.weight: layer for layer in layers(model).values()}
    reasons = unsupported(model)
    trainable = {leaf.param for leaf in leaves}

    def rule_of(p: Tensor) -> str:
        return str(overrides.get(id(p), {}).get("rule", rule))

    def takes(layer: Layer) -> bool:
        limit = overrides.get(id(layer.weight), {}).get("max_precond_dim", longest)
        fits = max(layer.shape[1:]) <= limit
        return layer.weight in trainable and captures(rule_of(layer.weight)) and fits

    joined = {
        layer.bias: layer
        for layer in by_weight.values()
        if takes(layer) and layer.bias in trainable and captures(rule_of(layer.bias))
    }
    rows = []
    for leaf in leaves:
        override, layer = overrides.get(id(leaf.param), {}), by_weight.get(leaf.param)
        if leaf.param in joined:
            layer = joined[leaf.param]
            rows.append(
                _bias_row(leaf, layer, rule_of(layer.weight), {**overrides.get(id(layer.weight), {}), **override})
            )
        elif layer is not None and takes(layer):
            rows.append(_weight_row(leaf, layer, rule_of(leaf.param), layer.bias in joined, override))
        else:
            if layer is not None:
                why = f"sides {layer.shape[1]}, {layer.shape[2]}: longer than max_precond_dim"
            else:
                why = reasons.get(leaf.name.rpartition(".")[0], "")
            if captures(str(override.get("rule", elementwise))):
                raise ValueError(f"{leaf.name}: {override['rule']} by override: {why or 'no layer multiplies by it'}")
            row = classify(leaf, elementwise, elementwise, {}, override)
            plain = leaf.is_norm or leaf.is_bias or leaf.is_vector
            why = why if why and not plain and "rule" not in override else row.why
            rows.append(replace(row, hidden=row.view is not None, why=why))
    return tuple(rows)


def _weight_row(leaf: Leaf, layer: Layer, rule: str, joins: bool, override: Mapping[str, Any]) -> Row:
    view = View(tuple(leaf.param.shape), transpose=layer.transposed, heads=layer.groups, bias=joins)
    kind = f"{type(layer.module).__name__}{', with its bias' if joins else ''}"
    layout, options = Layout(view, kind, members="groups"), resolve({"rule": rule, **override})
    del options["rule"]
    view_options = {name: options.pop(name) for name in OPTIONS if name in options}
    layout = adjusted(leaf, layout, view_options) if view_options else layout
    rank = min(layer.shape[1:]) if leaf.is_lora and "max_precond_dim" not in options else None
    if rank:
        layout = replace(layout, why=f"{layout.why}, without a factor of its long side")
    return Row(
        name=leaf.name,
        param=leaf.param,
        rule=rule,
        view=layout.view,
        layout=str(layout),
        why=f"override (else {layout.why})" if override else layout.why,
        state_bytes=sum(state_bytes(rule, piece, rank) for piece in layout.view.pieces),
        hidden=True,
        decays=not leaf.is_vector,
        options=options,
        longest_basis=rank,
    )


def _bias_row(leaf: Leaf, layer: Layer, rule: str, override: Mapping[str, Any]) -> Row:
    """Return the row of a bias, for which the options of its weight hold, too."""
    options = resolve({"rule": rule, **override})
    options = {name: value for name, value in options.items() if name not in ("rule", *OPTIONS)}
    return Row(
        name=leaf.name,
        param=leaf.param,
        rule=rule,
        view=View(tuple(layer.weight.shape), transpose=layer.transposed, heads=layer.groups, bias=True),
        layout=f"column of {layer.shape[1] * layer.groups}",
        why=f"override (else column of {layer.name}.weight)" if override else f"last column of {layer.name}.weight",
        state_bytes=0,
        hidden=True,
        decays=False,
        options=options,
    )
