"""Optimizers that break clauses on compilers, autocast, default devices and other settings of the caller."""

from __future__ import annotations

from typing import Any

import torch
from mutants import Mutants, parameters
from torch import Tensor

MUTANTS = Mutants()
breaks = MUTANTS.breaks


class Descends(torch.optim.SGD):
    """SGD along something that is made of each gradient."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"lr": 1e-2, "momentum": 0.9} | options)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        kept = [(p, p.grad) for p in parameters(self) if p.grad is not None]
        for p, grad in kept:
            p.grad = self.along(grad)
        super().step()
        for p, grad in kept:
            p.grad = grad
        return loss

    def along(self, g: Tensor) -> Tensor:
        return g


@breaks("autocast")
class MultipliesAsTold(Descends):
    def along(self, g: Tensor) -> Tensor:
        return (g.new_ones(1, 1) @ g.view(1, -1)).view(g.shape).to(g.dtype)


@breaks("default_device")
class MakesTensorsSomewhere(Descends):
    def along(self, g: Tensor) -> Tensor:
        return g * torch.ones(g.shape, dtype=g.dtype)


@breaks("default_dtype")
class MakesTensorsOfSomeDtype(Descends):
    def along(self, g: Tensor) -> Tensor:
        return (g * torch.full(g.shape, 0.1, device=g.device)).to(g.dtype)


@breaks("deterministic")
class HasAnotherWay(Descends):
    def along(self, g: Tensor) -> Tensor:
        return g * 1.001 if torch.are_deterministic_algorithms_enabled() else g


@breaks("inductor_step")
class CountsOnRounding(Descends):
    """Inductor fuses operations, and doesn't round in between."""

    def along(self, g: Tensor) -> Tensor:
        return g + ((g.bfloat16() + 256) - 256)
