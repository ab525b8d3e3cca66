"""Residuals of a network at points, as functions of one point, so that their Jacobian comes at the price of one sweep.

A closure that returns all residuals drags every point along when one of them is differentiated. A function of one point
is differentiated for all points at once (`torch.func.vmap`): each row of the Jacobian costs one point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

NUMBERS = 2**24
"""Of the Jacobian's numbers so many are made at once: 128 MiB in float64."""


class Residual:
    """What a network leaves unsatisfied, ``r(x_i)`` at points ``x_i``; its loss is ``½ w mean_i |r(x_i)|²``.

    Args:
        function: takes the network ``u`` and the data of one point, and returns a number or a vector ``[q]``. ``u``
            itself takes one point; where the network has one output, ``u(x)`` is a number, so that `torch.func.grad`
            can differentiate it. Other parameters of the model are read from the model.
        data: tensors ``[n, ...]``, of which row i belongs to point i; first the points, then what else is needed there,
            such as values on a boundary.
        weight: w, which must be above 0.

    Raises:
        ValueError: for data without points, or of different lengths, and for a weight that is not above 0.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
        >>> slope = Residual(lambda u, t: torch.func.grad(u)(t)[0] + u(t), t)  # u' = -u
        >>> start = Residual(lambda u, t: u(t) - 1, t[:1])  # u(0) = 1
        >>> slope.values(model).shape
        torch.Size([20])
        >>> optimizer = steepest.GaussNewton(model)
        >>> for _ in range(20):
        ...     loss = optimizer.step([slope, start])
        >>> bool((model(t) - (-t).exp()).abs().max() < 1e-5)
        True
    """

    def __init__(self, function: Callable[..., Tensor], *data: Tensor, weight: float = 1.0) -> None:
        if not data:
            raise ValueError("a Residual needs points: Residual(function, points, ...)")
        lengths = [len(x) if x.dim() else 0 for x in data]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                f"a Residual's data have shapes {[list(x.shape) for x in data]}: each needs one row a point, "
                "and the same number of rows, at least one"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight={weight!r}: must be a number above 0")
        self.function, self.data, self.weight = function, data, float(weight)

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.data[0])

    def __repr__(self) -> str:
        """Return the function's name, the number of points, and the weight."""
        return f"Residual({getattr(self.function, '__name__', self.function)}, {len(self)} points, {self.weight})"

    def values(self, model: nn.Module) -> Tensor:
        """Return ``r``, ``[n]`` or ``[n, q]``, in the graph of the model's parameters."""
        evaluate = _Evaluate(model, self.function)
        states = _states(model) | dict(model.named_parameters())
        found: Tensor = vmap(lambda *point: evaluate.at(states, *point))(*self.data)
        return found

    def loss(self, model: nn.Module) -> Tensor:
        """Return ``½ w mean_i |r(x_i)|²`` in the graph of the model's parameters, for optimizers of any kind."""
        return self.values(model).square().sum() * (self.weight / 2 / len(self))


class _Evaluate(nn.Module):
    """A residual at one point as a module around the model.

    A function that reads other parameters of the model than ``u`` does meets the given ones there too, since
    `functional_call` puts them into the model while the function runs.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *point: Tensor) -> Tensor:
        return self.function(self._u, *point)

    def at(self, states: dict[str, Tensor], *point: Tensor) -> Tensor:
        """Return the residual at one point with these parameters and buffers of the model."""
        found: Any = functional_call(self, {f"model.{name}": x for name, x in states.items()}, point)
        return found

    def _u(self, *inputs: Tensor) -> Tensor:
        outputs = self.model(*inputs)
        return outputs.reshape(()) if outputs.numel() == 1 else outputs


def _states(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's buffers, which evaluations may change without changing the model's."""
    return {name: x.detach().clone() for name, x in model.named_buffers()}
