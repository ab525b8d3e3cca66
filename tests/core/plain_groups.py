"""What the tests of groups and their options share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from steepest import Optimizer
from steepest.optimizers import NAMES


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    """Parameters with gradients, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes or [(6, 4)]]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator)
    return made


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All weights and states, as copies."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(x for p in params for _, x in sorted(optimizer.state[p].items()))]
    return [x.detach().clone() for x in tensors]


def expect_same(optimizer: torch.optim.Optimizer, before: list[Tensor]) -> None:
    for x, y in zip(snapshot(optimizer), before, strict=True):
        assert torch.equal(x, y)


def arguments(optimizer: type[Optimizer]) -> Mapping[str, Any]:
    """The arguments of a class beside its parameters, with their defaults; None for those that are in ``options``."""
    found = inspect.signature(optimizer).parameters
    (options,) = get_type_hints(optimizer.__init__, include_extras=True)["options"].__args__
    rest = dict.fromkeys(get_type_hints(options))
    return rest | {name: p.default for name, p in found.items() if name not in ("params", "options")}


CLASSES = [entry.optimizer for entry in NAMES.values() if inspect.isclass(entry.optimizer)]
