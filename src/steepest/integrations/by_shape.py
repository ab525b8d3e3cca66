"""One optimizer for hosts that hand over parameters and settings as text: a dotted path, and ``key=value``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.integrations.arguments import sort
from steepest.integrations.cutting import Cut, as_groups, cut
from steepest.integrations.telling import tell
from steepest.optimizers.shared import Params
from steepest.routing.classify import Overrides
from steepest.routing.table import Routing


class ByShape(Optimizer):
    """One optimizer for a model's parameters without the model: matrices under a rule, the rest entry by entry.

    Names decide, as `steepest.route` does, where groups have ``param_names`` or parameters come as pairs; otherwise
    shapes do. Vectors and tables of a vocabulary's size are stepped entry by entry, as is the last matrix where its
    shape is unique, since it is mostly the output head; LoRA factors, convolutions and linear layers as matrices; and
    ``[E, m, n]`` as E matrices. `steepest.for_model` knows more, so use it where a host lets you.

    Args:
        params: Tensors, groups (dicts), or ``(name, tensor)`` pairs of one model. A group is cut into several, whose
            other entries stay; one with ``rule`` is taken as it is, and one with ``use_fallback`` holds no matrices.
        lr: The learning rate of groups that have none. It may be left out if a recipe has one.
        name: The optimizer of matrices, or a recipe.
        elementwise: Options of all other parameters, as in `steepest.for_model`. In a group with an ``lr`` of its own,
            their ``lr`` keeps its ratio to that of matrices.
        overrides: As in `steepest.route`, by name; parameters need names then.
        options: Further options. Strings are read as numbers, tuples and bools. ``betas`` and ``eps`` go where they
            mean Adam's, and what hosts pass to everybody (``momentum``, ``foreach``, ...) is ignored where it means
            nothing; the log says so.

    Raises:
        TypeError: If there is no learning rate.
        ValueError: If an option is unknown or out of range.

    Warns:
        UserWarning: Once, for everything that could only be guessed, or looks wrong.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        >>> optimizer = ByShape(model.parameters(), lr="1e-3", name="muon", betas=(0.9, 0.95))
        >>> [(group["rule"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', 3), ('adamw', 3)]
        >>> optimizer.routing
        parameter          shape  rule   state   why
        params.0           32×64  muon   8.2 kB  matrix
        params.{1,3,5} ×3  32     adamw  780 B   vector
        params.{2,4} ×2    32×32  muon   8.2 kB  matrix
        ...
    """

    routing: Routing | None = None
    """What went where, and why; None after unpickling."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | str | None = None,
        name: str = "soap",
        *,
        elementwise: Mapping[str, Any] | None = None,
        overrides: Overrides | None = None,
        **options: Any,
    ) -> None:
        matrices, rest, notes = sort(name, elementwise or {}, options if lr is None else {"lr": lr, **options})
        groups = as_groups(params)
        if "lr" not in matrices and not all("lr" in group for group in groups):
            raise TypeError(f"{type(self).__name__}(params, lr=..., name={name!r}): the learning rate is missing")
        self._asked = (matrices, rest, overrides)
        made = cut(groups, *self._asked)
        super().__init__(made.groups, **matrices)
        self._tell(made, notes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, by their shapes or names; a group that names its ``rule`` is taken as it is."""
        if not isinstance(param_group, dict) or "rule" in param_group or "params" not in param_group:
            super().add_param_group(param_group)
            return
        made = cut(as_groups([param_group]), *self._asked)
        for group in made.groups:
            super().add_param_group(group)
        self._tell(made, [])

    def _tell(self, made: Cut, notes: list[str]) -> None:
        if self.routing is None:
            self.routing = made.routing
        tell(type(self).__name__, made.routing, [*notes, *made.notes], stacklevel=3)

    def train(self, mode: bool = True) -> None:
        """Do nothing: the weights in training are those to be evaluated. Some hosts call it."""

    def eval(self) -> None:
        """Do nothing, as `train`."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_asked": self._asked}
