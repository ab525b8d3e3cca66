"""A Curvature that also sums δ āᵀ, which must be the gradient, and models to try it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steepest.curvature import Curvature, Layer


class Checked(Curvature):
    """It listens from the start, and counts how often it was fed."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.listening = True
        self.calls: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}

    def feed(self, layer: Layer, inputs: Tensor, gradients: Tensor) -> None:
        super().feed(layer, inputs, gradients)
        self.calls[layer.name] = self.calls.get(layer.name, 0) + 1
        with torch.no_grad():
            for rows, deltas in layer.blocks(inputs, gradients):
                product = torch.einsum("gbsm,gbsn->gmn", deltas, rows)
                self.sums[layer.name] = self.sums.get(layer.name, 0.0) + product

    def check(self, tolerance: float = 1e-5) -> None:
        """The sums are the gradients, of weight and bias, of all layers that have one."""
        for layer in self.layers:
            gradient = layer.weight.grad
            if gradient is None:
                assert layer.name not in self.sums
                continue
            wanted = layer.join(gradient, None if layer.bias is None else layer.bias.grad)
            error = (self.sums[layer.name].view_as(wanted) - wanted).norm() / wanted.norm()
            assert error < tolerance, f"{layer.name}: {error:.1e}"


def close(x: Tensor, y: Tensor, tolerance: float = 1e-12) -> None:
    """Entries differ by at most a fraction of the largest."""
    torch.testing.assert_close(x, y, rtol=0.0, atol=tolerance * float(y.abs().max()))


def mlp(**factory: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8, **factory),
        nn.Tanh(),
        nn.Linear(8, 6, bias=False, **factory),
        nn.Tanh(),
        nn.Linear(6, 3, **factory),
    )


def loss_of(outputs: Tensor) -> Tensor:
    """A mean over rows."""
    return (outputs * outputs.detach().cos()).square().sum(-1).mean()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).tanh()).tanh())
