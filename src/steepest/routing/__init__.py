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
  captured  the same for K-FAC, which takes layers and not parameters
  deciding  all of it
  audit     warnings
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers import group_options
from steepest.recipes import unfold_elementwise
from steepest.routing.captured import captures
from steepest.routing.classify import Overrides
from steepest.routing.deciding import Lora, Model, route
from steepest.routing.survey import joined
from steepest.routing.table import Routing, Row

__all__ = ["Overrides", "Routing", "Row", "for_model", "route"]


def for_model(
    model: Model,
    name: str = "soap",
    *,
    lr: float | Tensor | None = None,
    elementwise: Mapping[str, Any] | None = None,
    overrides: Overrides | None = None,
    decay_1d: bool = False,
    lora: Lora = "both",
    **options: Any,
) -> Optimizer:
    """Build one optimizer for a whole model: hidden matrices under a matrix rule, the rest entry by entry.

    Args:
        model: Any module, or a list or dict of modules; their frozen parameters are left out.
        name: The optimizer of hidden matrices ("soap", "rekls", "muon", ...); an elementwise one takes all parameters.
            A recipe ("muon/moonlight", see `steepest.recipe`) brings settings for both; yours take precedence.
        lr: The learning rate of hidden matrices. It may be left out if a recipe has one, and for K-FAC.
        elementwise: Options for all other parameters, such as ``{"lr": 3e-4, "betas": (0.9, 0.95)}``; ``rule`` may name
            another rule than AdamW. Learning rate and weight decay default to those of hidden matrices.
        overrides: As in `route`.
        decay_1d: Whether vectors, norms and biases decay too (`Routing.groups`).
        lora: "b" sends only the factor B of LoRA's B A to the matrix rule; see `route`.
        options: Further options of that optimizer, as its class takes them.

    Raises:
        TypeError: If the model is no module, or there is no learning rate.
        ValueError: If no parameter is trainable, or an option is unknown or out of range; the message suggests the
            nearest name.

    Warns:
        UserWarning: For everything that looks wrong; `route` shows the whole routing.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = for_model(model, "soap", lr=3e-3, weight_decay=0.1, elementwise={"lr": 1e-3})
        >>> [(group["rule"], group["lr"], group["param_names"]) for group in optimizer.param_groups]
        [('soap', 0.003, ['0.weight']), ('adamw', 0.001, ['0.bias', '2.bias']), ('adamw', 0.001, ['2.weight'])]
    """
    model = joined(model)
    if captures(group_options(name, {})["rule"]):
        from steepest.optimizers.kfac import build

        if lora != "both":
            route(model, name, lora=lora)  # which refuses it
        rates = {} if lr is None else {"lr": lr}
        return build(name, model, elementwise=elementwise, overrides=overrides, decay_1d=decay_1d, **rates, **options)
    settings = group_options(name, options if lr is None else {"lr": lr, **options})
    if "lr" not in settings:
        raise TypeError(f"for_model(model, {name!r}, lr=...): the learning rate is missing")
    rule = settings.pop("rule")
    entrywise = unfold_elementwise(name, elementwise or {})
    entrywise = group_options(entrywise.pop("rule", "adamw"), entrywise)
    routing = route(model, rule, elementwise=entrywise.pop("rule"), overrides=overrides, lora=lora)
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
