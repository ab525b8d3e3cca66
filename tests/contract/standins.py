"""Small optimizers that take a model or a closure, as others write them, for what the suite does with such."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Ear:
    """A hook that hears for one optimizer, and is deaf in copies of its model."""

    def __init__(self, optimizer: Whitens | None = None) -> None:
        self.of = None if optimizer is None else weakref.ref(optimizer)

    def __call__(self, *call: Any) -> None:
        optimizer = None if self.of is None else self.of()
        if optimizer is not None:
            optimizer.listen(*call)

    def __reduce__(self) -> Any:
        return Ear, ()


class Whitens(torch.optim.SGD):
    """SGD whose gradients are divided by the size of what comes into and back to each layer, which hooks measure."""

    guarded = True
    """Whether it looks for numbers that are not finite."""
    unhooks = False
    """Whether it takes its hooks away when it is copied."""
    rehooks = False
    """Whether it adds hooks whenever it gets a state."""

    def __init__(self, model: nn.Module, *, lr: float = 1e-2, momentum: float = 0.9, **options: Any) -> None:
        super().__init__(model.parameters(), lr=lr, momentum=momentum, **options)
        self.model = model
        self.hook()

    def hook(self) -> None:
        self.sums: dict[Tensor, Tensor] = {}
        self.hooks = [layer.register_forward_hook(Ear(self)) for layer in self.model.modules()]

    def listen(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight: Any = getattr(layer, "weight", None)
        if weight is None or not output.requires_grad or all(weight is not p for p in self.all()):
            return

        def add(grad: Tensor) -> None:
            self.sums[weight] = self.sums.get(weight, 0) + inputs[0].square().mean() * grad.float().square().mean()

        output.register_hook(add)

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sums, self.sums = self.sums, {}
        kept = [(p, p.grad) for p in self.all()]
        for p, grad in kept:
            if p in sums and not (self.guarded and not torch.isfinite(sums[p])):
                average = self.state[p].setdefault("size", torch.zeros((), device=p.device))
                average.lerp_(sums[p], 0.1)
            if grad is None or (self.guarded and not torch.isfinite(grad).all()):
                p.grad = None
            elif "size" in self.state[p]:
                p.grad = (grad / (self.state[p]["size"].sqrt() + 1e-3)).to(p.dtype)
        super().step()
        for p, grad in kept:
            p.grad = grad
        return loss

    def all(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        for hook in self.hooks if self.unhooks else ():
            hook.remove()
        return super().__getstate__() | {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state or self.rehooks:
            self.hook()
