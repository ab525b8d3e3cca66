"""The factory for ``optimizer_cls_and_kwargs`` of the Trainer of transformers, and of trainers built on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.integrations.building import build
from steepest.routing.classify import Overrides
from steepest.routing.deciding import Model


class TrainerFactory:
    """A factory of `steepest.for_model`'s optimizer for a Trainer, which calls ``TrainerFactory()(model, **kwargs)``.

    The Trainer gives an optimizer class two nameless groups, with and without decay. Whatever is no such class it calls
    with the model, so that routing sees all of it. The routing goes to the log "steepest.integrations" at the level
    INFO. ``TrainingArguments``' own ``learning_rate``, ``weight_decay`` and ``adam_*`` don't reach a factory: give
    them here. Schedules, warm-up, clipping and accumulation are the Trainer's, as ever.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> pair = (TrainerFactory, {"name": "muon", "lr": "1e-3", "elementwise": {"lr": 3e-4}})
        >>> factory, kwargs = pair    # Trainer(model, ..., optimizer_cls_and_kwargs=pair) does this:
        >>> optimizer = factory()(model, **kwargs)
        >>> [(group["rule"], group["lr"]) for group in optimizer.param_groups][:2]
        [('muon', 0.001), ('adamw', 0.0003)]
    """

    def __call__(
        self,
        model: Model,
        arguments: object = None,
        /,
        *,
        name: str = "soap",
        lr: float | Tensor | str | None = None,
        elementwise: Mapping[str, Any] | None = None,
        overrides: Overrides | None = None,
        decay_1d: bool | str = False,
        **options: Any,
    ) -> Optimizer:
        """Build the optimizer of a model.

        Args:
            model: The model, or several, as `steepest.for_model` takes them.
            arguments: The trainer's own arguments, which Axolotl's trainers pass; they are not read.
            name: The optimizer of hidden matrices, or a recipe.
            lr: Their learning rate.
            elementwise: Options of all other parameters.
            overrides: As in `steepest.route`.
            decay_1d: As in `steepest.for_model`.
            options: Further options. Strings are read as numbers, tuples and bools, as command lines have them. Adam's
                ``betas`` and ``eps`` go where they mean that; what means nothing to the optimizer, and is passed to
                every one (``momentum``, ``fused``, ...), is ignored, and the log says so.

        Raises:
            TypeError: If there is no learning rate.
            ValueError: If an option is unknown or out of range.
        """
        return build(
            type(self).__name__,
            model,
            name,
            lr,
            elementwise=elementwise,
            overrides=overrides,
            decay_1d=decay_1d,
            **options,
        )
