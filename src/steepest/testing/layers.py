"""A small model around given parameters, whose backward pass makes the gradients that one asks for.

An optimizer that takes a model sees the inputs of its layers and the gradients of their outputs, and makes statistics
of them. A layer's inputs here are unit vectors times powers of two, one for each column of its matrix, so that
products with them round nothing:

    x_i = c_i e_i        δ_i = G e_i / c_i        Σ_i δ_i x_iᵀ = G

A row of zeros more gives the bias what is missing in its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

GradientOf = Callable[[str], Tensor]
"""A function that returns the gradient that the parameter of this name is to have."""

LINEAR, BIAS, KERNEL = ("first.weight", "second.weight"), "bias", "kernel"


class Layers(nn.Module):
    """Linear layers and a convolution around the parameters of these names; all others are parameters of their own.

    The bias belongs to the second layer, as long as its weight is there.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.of: dict[str, tuple[str, ...]] = {}
        """The names of the parameters in each layer."""
        for name in params:
            if name in LINEAR:
                has_bias = name == LINEAR[1] and BIAS in params
                self.of[name.partition(".")[0]] = (name, BIAS) if has_bias else (name,)
            elif name == KERNEL:
                self.of[KERNEL] = (KERNEL,)
        within = {name for names in self.of.values() for name in names}
        self.alone = tuple(name for name in params if name not in within)
        """The names of the parameters that are in no layer."""
        for name in params:
            layer = name.partition(".")[0]
            if layer in self.of:
                self.add_module(layer, _layer(params[name], params[BIAS] if BIAS in self.of[layer] else None))
            elif name in self.alone:
                self.register_parameter(name, params[name])  # type: ignore[arg-type]

    def forward(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs of the layers that get rows, as those of one sample, ``[1, C]``."""
        called = ((self.get_submodule(layer), x) for layer, x in rows.items())
        return torch.cat([layer(x).reshape(1, -1) for layer, x in called], 1)

    def loss(self, k: int, gradient: GradientOf, missing: Collection[str] = ()) -> tuple[Tensor | None, list[Tensor]]:
        """Return the outputs, and the terms of a loss with the gradients that are asked for.

        Layers with a missing parameter are not called, as experts without tokens.
        """
        rows, deltas, outputs, terms = {}, [], None, []
        for layer, names in sorted(self.of.items()):  # outputs in the same order, so that targets drawn for them are
            if missing and not set(names).isdisjoint(missing):
                continue
            weight: Tensor = self.get_submodule(layer).weight  # type: ignore[assignment]
            x, delta = _rows(k, weight, gradient(names[0]), gradient(names[1]) if len(names) > 1 else None)
            rows[layer] = x.view(-1, *weight.shape[1:])
            deltas.append(delta.reshape(1, -1))
        if rows:
            outputs = self(rows)
            terms.append((outputs * torch.cat(deltas, 1)).sum())
        terms += [(self.get_parameter(name) * gradient(name)).sum() for name in self.alone if name not in missing]
        return outputs, [term for term in terms if term.requires_grad]


def _layer(weight: Any, bias: Any) -> nn.Module:
    """Return a layer around these tensors, and draw no random numbers."""
    m, n, *size = weight.shape
    layer: nn.Linear | nn.Conv2d
    if size:
        layer = nn.Conv2d(n, m, (size[0], size[1]), bias=bias is not None, device="meta")
    else:
        layer = nn.Linear(n, m, bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _rows(k: int, weight: Tensor, grad: Tensor, grad_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the inputs ``[R, n]`` of a layer, and the gradients ``[R, m]`` of its outputs."""
    columns = grad.flatten(1).mT  # [n, m]
    n = len(columns)
    powers = [2.0 ** ((i + k) % 3 - 1) for i in range(n)]
    c = torch.tensor(powers, dtype=weight.dtype, device=weight.device)  # [n]
    rows, deltas = torch.diag(c), columns / c[:, None]
    if grad_bias is not None:
        rows = torch.cat([rows, rows.new_zeros(1, n)])
        deltas = torch.cat([deltas, (grad_bias - deltas.sum(0))[None]])
    return rows, deltas
