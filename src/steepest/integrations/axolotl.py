"""A plugin for Axolotl, which makes the optimizer of its trainers: see docs/hosts.md.

    plugins:
      - steepest.integrations.axolotl.Plugin
    learning_rate: 3.0e-3
    optim_args: {name: soap, elementwise: {lr: 1.0e-3}}

Axolotl documents a hook ``create_optimizer(cfg, trainer)``, which its releases don't call (0.18, 0.19 and 0.21 don't).
They call ``post_trainer_create``, so this is where the trainer gets its factory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.integrations.base import BasePlugin

from steepest.integrations.arguments import sort
from steepest.integrations.trainer import TrainerFactory

RATES = ("embedding_lr", "embedding_lr_scale", "loraplus_lr_ratio", "lr_groups")
"""Settings that give some parameters another learning rate, where Axolotl makes the groups."""


class Plugin(BasePlugin):  # type: ignore[misc]  # untyped where Axolotl isn't installed
    """The optimizer that ``optim_args`` names, for the whole model of an Axolotl trainer.

    Entries of ``optim_args`` are settings of `steepest.integrations.TrainerFactory`, and take precedence over
    ``learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``.
    """

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer a factory of the optimizer, before it makes one.

        Raises:
            TypeError: If there is no learning rate, or ``optim_args`` is no mapping.
            ValueError: If an option is unknown or out of range, or means Axolotl's own optimizers.
        """
        settings = settings_of(cfg)
        if trainer.optimizer_cls_and_kwargs is not None:
            raise ValueError(f"optimizer={cfg.optimizer!r} is one of Axolotl's own: leave it out, or this plugin")
        if "lr" not in settings:
            raise TypeError("learning_rate is missing")
        name, elementwise = settings.get("name", "soap"), settings.get("elementwise") or {}
        others = ("name", "elementwise", "overrides", "decay_1d")
        sort(name, elementwise, {key: value for key, value in settings.items() if key not in others})  # raises early
        trainer.optimizer_cls_and_kwargs = (TrainerFactory, settings)


def settings_of(cfg: Any) -> dict[str, Any]:
    """Return what a configuration says of the optimizer, as `TrainerFactory` takes it."""
    given = cfg.optim_args or {}
    if not isinstance(given, Mapping):
        raise TypeError(f"optim_args={given!r}: must be a mapping, such as {{name: soap}}")
    for key in RATES:
        if cfg[key] is not None:
            raise ValueError(
                f"{key}={cfg[key]!r}: not supported; give rates in optim_args, by elementwise or overrides"
            )
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if betas.count(None) == 1:
        raise ValueError(f"adam_beta1={betas[0]}, adam_beta2={betas[1]}: give both, or neither")
    host = {
        "lr": cfg.learning_rate,
        "weight_decay": cfg.weight_decay,
        "betas": None if None in betas else betas,
        "eps": cfg.adam_epsilon,
    }
    return {key: value for key, value in host.items() if value is not None} | dict(given)
