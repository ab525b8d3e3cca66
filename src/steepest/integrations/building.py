"""The optimizer of a model, from a host's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.integrations.arguments import sort
from steepest.integrations.telling import tell
from steepest.routing import for_model, route
from steepest.routing.classify import Overrides
from steepest.routing.deciding import Model


def build(
    who: str,
    model: Model,
    name: str = "soap",
    lr: float | Tensor | str | None = None,
    *,
    elementwise: Mapping[str, Any] | None = None,
    overrides: Overrides | None = None,
    decay_1d: bool | str = False,
    **options: Any,
) -> Optimizer:
    """Build the optimizer of a model by `steepest.for_model`, and log its routing under ``who``.

    Settings are those of `steepest.integrations.TrainerFactory`.

    Raises:
        TypeError: If there is no learning rate.
        ValueError: If a name or an option is unknown, or an option is out of range.
    """
    matrices, rest, notes = sort(name, elementwise or {}, options if lr is None else {"lr": lr, **options})
    rule = matrices.pop("rule")
    optimizer = for_model(
        model, rule, elementwise=rest, overrides=overrides, decay_1d=decay_1d in (True, "True", "true"), **matrices
    )
    routing = route(model, rule, elementwise=rest["rule"], overrides=overrides)
    tell(f"{who}: {name}", replace(routing, warnings=()), notes, stacklevel=2)
    return optimizer
