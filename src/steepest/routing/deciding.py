"""The decision which rule optimizes which parameter of a model, as which matrices, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import nn

from steepest.exchange.foreign import refuse_flat
from steepest.optimizers import group_options
from steepest.routing import audit
from steepest.routing.captured import captured_rows, captures
from steepest.routing.classify import Overrides, classify, is_matrix_rule, resolve_overrides
from steepest.routing.heads import Heads, find_heads
from steepest.routing.survey import Leaf, joined, survey
from steepest.routing.table import Routing
from steepest.rules import RULES

Model = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
"""A module, or several, whose parameters' names then begin with indices or keys."""


Lora = Literal["both", "b"]
"""The factors of LoRA's B A that go to the rule of hidden matrices."""


def route(
    model: Model,
    rule: str = "soap",
    *,
    elementwise: str = "adamw",
    overrides: Overrides | None = None,
    lora: Lora = "both",
) -> Routing:
    """Decide for every trainable parameter of a model which rule optimizes it, and as which matrices.

    Weights of linear layers and convolutions, experts and recurrent gates are hidden matrices and go to ``rule``.
    Embeddings, output heads, norms, biases, routers and all vectors go to ``elementwise``. A ``rule`` that is
    elementwise itself takes all parameters. "kfac" and "ekfac" take every layer that can be captured, heads too, with
    its bias.

    Args:
        model: Any module, or a list or dict of modules, such as both networks of a GAN. Frozen parameters are left
            out.
        rule: The rule of hidden matrices, or the name of an optimizer or a recipe.
        elementwise: The rule of all other parameters, likewise.
        overrides: A dict from a glob pattern over parameter names, or from the type of a module around the parameter,
            to the name of another rule, or to a dict of options, which may hold ``rule``, ``lr`` and those of the view
            (`steepest.view`). Later overrides change earlier ones, or replace them if they name a rule. Options of
            matrices are not applied to vectors.
        lora: "both" (default) sends both factors of LoRA's B A to ``rule``. "b" sends only B there, which starts at
            zero and makes the update's outputs, and A, which reads the inputs, to ``elementwise``.

    Raises:
        TypeError: If the model is no module: its parameters alone don't tell what they are.
        ValueError: If a parameter is complex, lazy, looked up with sparse gradients, or cut into flat parts where
            ``rule`` needs matrices; if a rule is unknown, or an override matches nothing, or ``lora="b"`` does.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 10))
        >>> route(model, overrides={"3.weight": {"lr": 1e-4}})
        parameter  shape         rule   state    why
        0.weight   16×(3·3·3)    soap   ...      convolution, flattened
        0.bias     16            adamw  ...      bias
        ...
    """
    return decide(model, rule, elementwise, overrides, lora=lora)


def decide(
    model: Model,
    rule: str,
    elementwise: str,
    overrides: Overrides | None,
    max_precond_dim: int | None = None,
    lora: Lora = "both",
) -> Routing:
    """Do what `route` does; sides longer than ``max_precond_dim`` can't be captured, by default those of the rule."""
    rule, elementwise = (group_options(name, {})["rule"] for name in (rule, elementwise))
    model = joined(model)
    leaves = survey(model)
    trainable = [leaf for leaf in leaves if leaf.param.requires_grad]
    for leaf in trainable:
        audit.refuse(leaf)
        if is_matrix_rule(rule):
            refuse_flat(leaf.param, leaf.name, rule)
    if not is_matrix_rule(rule):
        elementwise = rule
    resolved = resolve_overrides(overrides or {}, leaves)
    by_entry = _lora_by_entry(trainable, lora, rule)
    if captures(rule):
        heads = Heads({})
        longest = RULES[rule].defaults()["max_precond_dim"] if max_precond_dim is None else max_precond_dim
        rows = captured_rows(model, trainable, rule, elementwise, resolved, longest)
    else:
        heads = find_heads(model, leaves)
        rows = tuple(
            classify(leaf, rule, elementwise, {**heads.why, **by_entry}, resolved.get(id(leaf.param), {}))
            for leaf in trainable
        )
    return Routing(rows, tuple(audit.warnings(leaves, rows, heads, resolved, rule, elementwise)), rule, elementwise)


def _lora_by_entry(leaves: Sequence[Leaf], lora: str, rule: str) -> dict[int, str]:
    """Return the factors of LoRA that ``lora`` leaves to the elementwise rule, by id, with the reason."""
    if lora not in get_args(Lora):
        raise ValueError(f"lora={lora!r}: must be one of {', '.join(get_args(Lora))}")
    if lora == "both":
        return {}
    if captures(rule):
        raise ValueError(
            f"lora={lora!r} with {rule}: must be 'both': {rule} takes layers; use overrides for some of them"
        )
    sides = {id(leaf.param): leaf.lora_side for leaf in leaves}
    if "b" not in sides.values():
        raise ValueError(f"lora={lora!r}: the model has no trainable factor B of LoRA; leave lora at 'both'")
    return {key: 'LoRA factor A: by lora="b"' for key, side in sides.items() if side == "a"}
