"""Names for LLaMA-Factory: importing this module registers the optimizers of this package as plugins of its v1.

    import steepest.integrations.llamafactory
    run_sft({..., "optim_config": {"name": "soap", "lr": 3e-3, "elementwise": {"lr": 1e-3}}})

A plugin gets the model and its own configuration, so routing sees everything, and settings are those of
`steepest.integrations.TrainerFactory`. The ``learning_rate`` of the training arguments doesn't reach it. LLaMA-Factory
keeps all kinds of plugins under one set of names; a name that another plugin has stays its own, and ours gets
"steepest-" in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from torch import nn

from steepest.engine.optimizer import Optimizer
from steepest.integrations.building import build
from steepest.optimizers import NAMES

Create = Callable[[nn.Module, Mapping[str, Any]], Optimizer]
"""What LLaMA-Factory calls: with the model, and with ``optim_config``, ``name`` among it."""


def creator(ours: str) -> Create:
    """Return the function that LLaMA-Factory calls for an optimizer of this package."""

    def create(model: nn.Module, config: Mapping[str, Any]) -> Optimizer:
        return build("LLaMA-Factory", model, ours, **{key: value for key, value in config.items() if key != "name"})

    return create


def register() -> dict[str, str]:
    """Register every optimizer; return the names in LLaMA-Factory by ours."""
    registered = {}
    for ours in NAMES:
        theirs = f"steepest-{ours}" if _is_taken(ours) else ours
        OptimizerPlugin(theirs).register()(creator(ours))
        registered[ours] = theirs
    return registered


def _is_taken(name: str) -> bool:
    try:
        function = OptimizerPlugin(name)["__call__"]
    except ValueError:  # not registered
        return False
    return getattr(function, "__module__", None) != __name__


REGISTERED = register()
"""The names in LLaMA-Factory, by ours."""
