"""Routing: which rule steps which parameter, seen as which matrices, and why.

Which optimizer a parameter got is the silent error of this field: a tied embedding sent to Muon, a head missed because
it is called ``weight``, a convolution net whose whole body fell to AdamW. `route` looks at module types, ties, shapes,
positions and names, and shows what it found; `for_model` builds the optimizer from it.

  survey     every parameter and where it stands
  heads      which of them produce the outputs
  reasons    why one is no hidden matrix
  sight      how a hidden matrix is laid out
  overrides  a person's word against all this
  judge      the verdict on one parameter
  audit      what looks wrong
  table      the result, to print and to take parameter groups from
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steepest.engine.optimizer import Optimizer
from steepest.optimizers import group_options
from steepest.recipes import unfold_elementwise
from steepest.routing import audit
from steepest.routing.heads import find_heads
from steepest.routing.judge import Judge, StateBytes
from steepest.routing.judge import state_bytes as allocated
from steepest.routing.overrides import Overrides, is_matrix_rule, resolve
from steepest.routing.survey import survey
from steepest.routing.table import Routing, Row

__all__ = ["Overrides", "Routing", "Row", "for_model", "route"]


def route(
    model: nn.Module,
    rule: str = "soap",
    *,
    elementwise: str = "adamw",
    overrides: Overrides | None = None,
    state_bytes: StateBytes = allocated,
) -> Routing:
    """Decide for every trainable parameter of a model which rule steps it, seen as which matrices.

    Weights of linear layers and convolutions, experts and recurrent gates are hidden matrices and go to ``rule``.
    Embeddings, output heads, norms, biases, routers and whatever is a vector go to ``elementwise``. A ``rule`` that is
    elementwise itself takes everything.

    Args:
        model: Any module. Frozen parameters are left out.
        rule: The rule for hidden matrices, or the name of an optimizer or a recipe.
        elementwise: The rule for the rest.
        overrides: By glob pattern over parameter names, or by type of a module around the parameter: the name of
            another rule, or a dict of options, among them ``rule``, ``lr`` and the view's (`steepest.view`). Later
            ones change what earlier ones say or, naming a rule, replace it. What is about matrices spares vectors.
        state_bytes: What a rule keeps for matrices of given shapes; default: what its ``init`` would allocate.

    Raises:
        ValueError: On complex or lazy parameters, on unknown rules, and on overrides that match nothing.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 10))
        >>> print(route(model, overrides={"3.weight": {"lr": 1e-4}}))
        parameter  shape     view         rule   why                                         state
        0.weight   16×3×3×3  16×(3·3·3)   soap   convolution, flattened                     ...
        0.bias     16        –            adamw  bias                                       ...
        ...
    """
    rule, elementwise = (group_options(name, {})["rule"] for name in (rule, elementwise))
    leaves = survey(model)
    trainable = [leaf for leaf in leaves if leaf.param.requires_grad]
    for leaf in trainable:
        audit.refuse(leaf)
    if not is_matrix_rule(rule):
        elementwise = rule
    heads = find_heads(model, leaves)
    said = resolve(overrides or {}, leaves)
    judge = Judge(rule, elementwise, heads, state_bytes)
    rows = tuple(judge.row(leaf, said.get(id(leaf.param), {})) for leaf in trainable)
    routed = audit.Routed(leaves, rows, heads, said, rule, elementwise)
    return Routing(rows, audit.warnings(routed), rule, elementwise)


def for_model(
    model: nn.Module,
    name: str = "soap",
    *,
    lr: float | Tensor | None = None,
    elementwise: Mapping[str, Any] | None = None,
    overrides: Overrides | None = None,
    decay_1d: bool = False,
    **options: Any,
) -> Optimizer:
    """One optimizer for a whole model: hidden matrices under a matrix rule, the rest entry by entry.

    Args:
        model: Any module; its frozen parameters are left out.
        name: The optimizer of hidden matrices ("soap", "rekls", "muon", ...); an elementwise one takes everything.
            A recipe's name ("muon/moonlight", see `steepest.recipe`) brings settings for both; yours go before them.
        lr: Its learning rate. It may be left out where a recipe has one.
        elementwise: Options for what is no hidden matrix: ``{"lr": 3e-4, "betas": (0.9, 0.95)}``; ``rule`` names
            another rule than AdamW. Learning rate and weight decay default to those of the matrix rule.
        overrides: As in `route`.
        decay_1d: Whether vectors, norms and biases decay too (`Routing.groups`).
        options: Further options of that optimizer, as its class takes them.

    Raises:
        TypeError: Without a learning rate.

    Warns:
        UserWarning: Whatever looks wrong in the routing; `route` shows the whole of it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = for_model(model, "soap", lr=3e-3, weight_decay=0.1, elementwise={"lr": 1e-3})
        >>> [(group["rule"], group["lr"], group["param_names"]) for group in optimizer.param_groups]
        [('soap', 0.003, ['0.weight']), ('adamw', 0.001, ['0.bias', '2.bias']), ('adamw', 0.001, ['2.weight'])]
    """
    settings = group_options(name, options if lr is None else {"lr": lr, **options})
    if "lr" not in settings:
        raise TypeError(f"for_model(model, {name!r}, lr=...): the learning rate is missing")
    rule = settings.pop("rule")
    entrywise = unfold_elementwise(name, elementwise or {})
    entrywise = group_options(entrywise.pop("rule", "adamw"), entrywise)
    routing = route(model, rule, elementwise=entrywise.pop("rule"), overrides=overrides)
    for text in routing.warnings:
        warnings.warn(text, stacklevel=2)
    groups = routing.groups(settings, entrywise, decay_1d=decay_1d)
    return Optimizer(groups, rule=rule, **settings)
