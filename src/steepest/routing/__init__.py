"""Routing: which rule optimizes which parameter of a model, as which matrices, and why.

An optimizer that gets the wrong parameters is a silent error: a tied embedding under Muon, a head that was missed
because it is called ``weight``, a convolution net whose whole body runs by AdamW. `route` decides by module types,
ties, shapes, positions and names, and shows what it found; `for_model` builds the optimizer from it.

  survey    all parameters, and the modules that hold them
  layout    the matrices that a weight consists of
  widths    which weights may read what others make
  heads     the projections that produce the outputs
  table     the result, to print and to take parameter groups from
  classify  the decision on one parameter, or the user's own
  audit     warnings
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from steepest.engine.optimizer import Optimizer
from steepest.exchange.foreign import refuse_flat
from steepest.optimizers import group_options
from steepest.recipes import unfold_elementwise
from steepest.routing import audit
from steepest.routing.classify import Overrides, classify, is_matrix_rule, resolve_overrides
from steepest.routing.heads import find_heads
from steepest.routing.survey import joined, survey
from steepest.routing.table import Routing, Row

__all__ = ["Overrides", "Routing", "Row", "for_model", "route"]

Model = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
"""A module, or several, whose parameters' names then begin with indices or keys."""


def route(
    model: Model, rule: str = "soap", *, elementwise: str = "adamw", overrides: Overrides | None = None
) -> Routing:
    """Decide for every trainable parameter of a model which rule optimizes it, and as which matrices.

    Weights of linear layers and convolutions, experts and recurrent gates are hidden matrices and go to ``rule``.
    Embeddings, output heads, norms, biases, routers and all vectors go to ``elementwise``. A ``rule`` that is
    elementwise itself takes all parameters.

    Args:
        model: Any module, or a list or dict of modules, such as both networks of a GAN. Frozen parameters are left
            out.
        rule: The rule of hidden matrices, or the name of an optimizer or a recipe.
        elementwise: The rule of all other parameters, likewise.
        overrides: A dict from a glob pattern over parameter names, or from the type of a module around the parameter,
            to the name of another rule, or to a dict of options, which may hold ``rule``, ``lr`` and those of the view
            (`steepest.view`). Later overrides change earlier ones, or replace them if they name a rule. Options of
            matrices are not applied to vectors.

    Raises:
        TypeError: If the model is no module: its parameters alone don't tell what they are.
        ValueError: If a parameter is complex, lazy, looked up with sparse gradients, or cut into flat parts where
            ``rule`` needs matrices; if a rule is unknown, or an override matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 10))
        >>> route(model, overrides={"3.weight": {"lr": 1e-4}})
        parameter  shape         rule   state    why
        0.weight   16×(3·3·3)    soap   ...      convolution, flattened
        0.bias     16            adamw  ...      bias
        ...
    """
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
    heads = find_heads(model, leaves)
    resolved = resolve_overrides(overrides or {}, leaves)
    rows = tuple(classify(leaf, rule, elementwise, heads.why, resolved.get(id(leaf.param), {})) for leaf in trainable)
    return Routing(rows, tuple(audit.warnings(leaves, rows, heads, resolved, rule, elementwise)), rule, elementwise)


def for_model(
    model: Model,
    name: str = "soap",
    *,
    lr: float | Tensor | None = None,
    elementwise: Mapping[str, Any] | None = None,
    overrides: Overrides | None = None,
    decay_1d: bool = False,
    **options: Any,
) -> Optimizer:
    """Build one optimizer for a whole model: hidden matrices under a matrix rule, the rest entry by entry.

    Args:
        model: Any module, or a list or dict of modules; their frozen parameters are left out.
        name: The optimizer of hidden matrices ("soap", "rekls", "muon", ...); an elementwise one takes all parameters.
            A recipe ("muon/moonlight", see `steepest.recipe`) brings settings for both; yours take precedence.
        lr: The learning rate of hidden matrices. It may be left out if a recipe has one.
        elementwise: Options for all other parameters, such as ``{"lr": 3e-4, "betas": (0.9, 0.95)}``; ``rule`` may name
            another rule than AdamW. Learning rate and weight decay default to those of hidden matrices.
        overrides: As in `route`.
        decay_1d: Whether vectors, norms and biases decay too (`Routing.groups`).
        options: Further options of that optimizer, as its class takes them.

    Raises:
        TypeError: If the model is no module, or there is no learning rate.
        ValueError: If no parameter is trainable, or an option is unknown or out of range; the message suggests the
            nearest name.

    Warns:
        UserWarning: For everything that looks wrong; `route` shows the whole routing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = for_model(model, "soap", lr=3e-3, weight_decay=0.1, elementwise={"lr": 1e-3})
        >>> [(group["rule"], group["lr"], group["param_names"]) for group in optimizer.param_groups]
        [('soap', 0.003, ['0.weight']), ('adamw', 0.001, ['0.bias', '2.bias']), ('adamw', 0.001, ['2.weight'])]
    """
    model = joined(model)
    settings = group_options(name, options if lr is None else {"lr": lr, **options})
    if "lr" not in settings:
        raise TypeError(f"for_model(model, {name!r}, lr=...): the learning rate is missing")
    rule = settings.pop("rule")
    entrywise = unfold_elementwise(name, elementwise or {})
    entrywise = group_options(entrywise.pop("rule", "adamw"), entrywise)
    routing = route(model, rule, elementwise=entrywise.pop("rule"), overrides=overrides)
    if not routing.rows:
        frozen = sum(1 for _ in model.parameters())
        raise ValueError(
            f"all {frozen} parameters of the model are frozen: thaw those to be trained (requires_grad_(True)) first"
            if frozen
            else "the model has no parameters"
        )
    for text in routing.warnings:
        warnings.warn(text, stacklevel=2)
    groups = routing.groups(settings, entrywise, decay_1d=decay_1d)
    return Optimizer(groups, rule=rule, **settings)
