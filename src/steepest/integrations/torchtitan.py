"""The optimizers of a torchtitan trainer, to stand in its configuration: see docs/hosts.md.

    from steepest.integrations.torchtitan import SteepestOptimizers

    config.optimizer = SteepestOptimizers.Config(name="soap", lr=3e-3, elementwise={"lr": 1e-3})

torchtitan's own container looks names up in a closed list and sends parameters to optimizers by patterns. This one
makes one optimizer for each part of the model, a stage of a pipeline, by `steepest.for_model`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtitan.components.optimizer import OptimizersContainer

from steepest.integrations.building import build
from steepest.routing.classify import Overrides
from steepest.routing.survey import survey

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""A key for each value: parts of a pipeline number their groups alike, and names tell them apart."""


class SteepestOptimizers(OptimizersContainer):  # type: ignore[misc]  # untyped where torchtitan isn't installed
    """A container with one optimizer for each part of a model, which torchtitan steps, schedules and saves.

    Args:
        config: The settings.
        model_parts: The parts of the model on this rank, with the names that their parameters have in the whole.

    Raises:
        ValueError: If an option is unknown or out of range, or means torchtitan's own optimizers.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """The settings: a name, a learning rate, and what `steepest.integrations.TrainerFactory` takes besides."""

        name: str = "soap"
        """The optimizer of hidden matrices, or a recipe."""
        lr: float
        """The learning rate of hidden matrices."""
        elementwise: dict[str, Any] = field(default_factory=dict)
        """Options of all other parameters."""
        overrides: dict[str, Any] = field(default_factory=dict)
        """Options of some parameters, by name, as in `steepest.route`."""
        options: dict[str, Any] = field(default_factory=dict)
        """Further options of the optimizer, such as ``weight_decay``."""

    def __init__(self, config: Config, *, model_parts: Sequence[nn.Module]) -> None:
        _refuse_inherited(config)
        self.model_parts = list(model_parts)
        self.optimizers = [_build(part, config) for part in self.model_parts]
        every = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        torch.optim.Optimizer.__init__(self, every, {})  # for hooks; each optimizer has its own groups

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts, flat, under the names of their parameters."""
        parts = zip(self.model_parts, self.optimizers, strict=True)
        flat = [get_optimizer_state_dict(part, optimizer, options=FLAT).items() for part, optimizer in parts]
        return {key: value for items in flat for key, value in items if not _is_of_stages(key)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of each part, which may have been in other stages; other parts' entries are not looked at."""
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            flat = get_optimizer_state_dict(part, optimizer, options=FLAT)
            own = {key: value for key, value in flat.items() if _is_of_stages(key)}
            set_optimizer_state_dict(part, optimizer, state_dict | own, options=FLAT)


def _is_of_stages(key: str) -> bool:
    """Return whether an entry lists the parameters of a group, which differ where there are other stages."""
    return key.startswith("param_groups.") and key.endswith(".param_names")


def _build(part: nn.Module, config: SteepestOptimizers.Config) -> torch.optim.Optimizer:
    stage = None in part._modules.values()  # of a pipeline, which does without what other stages have
    names = [place.name for leaf in survey(part) for place in leaf.places]
    overrides: Overrides = {
        key: value
        for key, value in config.overrides.items()
        if not stage or any(fnmatchcase(name, key) for name in names)
    }
    with warnings.catch_warnings():
        if stage:
            warnings.filterwarnings("ignore", message="no output head was recognised")
        return build(
            "torchtitan",
            part,
            config.name,
            config.lr,
            elementwise=config.elementwise,
            overrides=overrides,
            **config.options,
        )


def _refuse_inherited(config: SteepestOptimizers.Config) -> None:
    """Raise if a setting of torchtitan's own optimizers has been changed, since it would mean nothing."""
    for setting in fields(OptimizersContainer.Config):
        default = setting.default if setting.default_factory is MISSING else setting.default_factory()
        if (value := getattr(config, setting.name)) != default:
            raise ValueError(
                f"{setting.name}={value!r}: means torchtitan's own optimizers; give name, lr, elementwise, overrides "
                "and options"
            )
