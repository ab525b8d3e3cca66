"""Residuals of a network at points, as functions of one point, so that their Jacobian comes at the price of one sweep.

A closure that returns all residuals drags every point along when one of them is differentiated. A function of one point
is differentiated for all points at once (`torch.func.vmap`): each row of the Jacobian costs one point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

NUMBERS = 2**23
"""Of the Jacobian's numbers so many are made at once: 64 MiB in float64."""

POINTS = 2**16
"""At so many points residuals are evaluated at once."""


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
        >>> import torch, steepest
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        >>> t = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
        >>> slope = steepest.Residual(lambda u, t: torch.func.grad(u)(t)[0] + u(t), t)  # u' = -u
        >>> start = steepest.Residual(lambda u, t: u(t) - 1, t[:1])  # u(0) = 1
        >>> slope.values(model).shape
        torch.Size([20])
        >>> optimizer = steepest.GaussNewton(model)
        >>> for _ in range(20):
        ...     loss = optimizer.step([slope, start])
        >>> bool((model(t) - (-t).exp()).abs().max() < 1e-3)
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
        at = _Evaluation(model, self.function).at
        found: Tensor = vmap(lambda *point: at({}, *point), chunk_size=POINTS)(*self.data)
        return found

    def loss(self, model: nn.Module) -> Tensor:
        """Return ``½ w mean_i |r(x_i)|²`` in the graph of the model's parameters, for optimizers of any kind."""
        return self.values(model).square().sum() * (self.factor**2 / 2)

    @property
    def factor(self) -> float:
        """By which ``r`` is multiplied, ``sqrt(w / n)``, so that the loss is half the sum of squares."""
        return math.sqrt(self.weight / len(self))

    def blocks(self, model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield, for some points after the others, their rows of the Jacobian and their values, times `factor`.

        Args:
            model: the network.
            params: the parameters by which is differentiated, by their names in the model, detached.

        Yields:
            The derivatives ``[c, *p.shape]`` or ``[c, q, *p.shape]`` by each parameter, and the values, ``[c]`` or
            ``[c, q]``. If not all are made at once, the first block is of one point, since q is not known before.
        """
        at, size = _Evaluation(model, self.function).at, sum(p.numel() for p in params.values())

        def row(*point: Tensor) -> tuple[list[Tensor], Tensor]:
            r, pull = vjp(lambda params: at(params, *point), params)[:2]
            if r.dim():
                units = self.factor * torch.eye(len(r), dtype=r.dtype, device=r.device)
                (pulled,) = vmap(pull)(units)
            else:
                (pulled,) = pull(torch.full_like(r, self.factor))
            return list(pulled.values()), self.factor * r

        start, stop = 0, len(self) if len(self) * size <= NUMBERS else 1
        while start < len(self):
            rows, values = vmap(row)(*(x[start:stop] for x in self.data))
            yield rows, values
            numbers = size * values[0].numel()
            start, stop = stop, stop + max(1, NUMBERS // numbers)


def joined(model: nn.Module, residuals: Sequence[Residual]) -> Tensor:
    """Return the values of residuals times their factors, ``[R]``, in the graph of the model's parameters."""
    return torch.cat([residual.factor * residual.values(model).reshape(-1) for residual in residuals])


def summed(model: nn.Module, residuals: Sequence[Residual], enough: float) -> float:
    """Return the sum of the residuals' losses; as soon as a part of it is not below ``enough``, that part.

    Losses are not negative, so whoever asks whether the sum is below that number need not know the rest.
    """
    total = 0.0
    for residual in residuals:
        total += half_square(residual.factor * residual.values(model))
        if not total < enough:  # NaN, too
            break
    return total


def half_square(r: Tensor) -> float:
    """Return ``½ ‖r‖²``, summed in float64.

    >>> half_square(torch.tensor([3.0, 4.0]))
    12.5
    """
    r = r.detach().reshape(-1).double()
    return float(r.dot(r)) / 2


class Rows:
    """The residuals of a network and their Jacobian ``J [R, P]``, of which only the first block is made at first.

    Args:
        model: the network.
        residuals: what it leaves unsatisfied.
        params: the parameters by which is differentiated, by their names in the model.
    """

    def __init__(self, model: nn.Module, residuals: Sequence[Residual], params: Mapping[str, Tensor]) -> None:
        self._params = {name: p.detach() for name, p in params.items()}
        self._streams = [residual.blocks(model, self._params) for residual in residuals]
        self._first = [next(stream) for stream in self._streams]
        widths = [values[0].numel() for _, values in self._first]
        self.shape = (
            sum(len(residual) * q for residual, q in zip(residuals, widths, strict=True)),
            sum(p.numel() for p in self._params.values()),
        )
        """R and P."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return J, and the residuals ``[R]``; half their squares' sum is the loss. It can be called once."""
        some = self._first[0][1]
        J, r = some.new_empty(self.shape), some.new_empty(self.shape[0])
        top = 0
        for first, stream in zip(self._first, self._streams, strict=True):
            for rows, values in chain([first], stream):
                bottom, left = top + values.numel(), 0
                r[top:bottom] = values.reshape(-1)
                for x, p in zip(rows, self._params.values(), strict=True):
                    J[top:bottom, left : left + p.numel()] = x.reshape(-1, p.numel())
                    left += p.numel()
                top = bottom
        return J, r


class _Evaluation(nn.Module):
    """A residual at one point, as a module around the model.

    A function that reads other parameters of the model than ``u`` does meets the given ones there too, since
    `functional_call` puts them into the model while the function runs.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *point: Tensor) -> Tensor:
        return self.function(self._u, *point)

    def at(self, params: Mapping[str, Tensor], *point: Tensor) -> Tensor:
        """Return the residual at one point, with these parameters for the model's; its buffers stay as they are."""
        own = {f"model.{name}": x.detach().clone() for name, x in self.model.named_buffers()}
        own |= {f"model.{name}": x for name, x in params.items()}
        found: Any = functional_call(self, own, point) if own else self(*point)
        if not isinstance(found, Tensor) or found.dim() > 1:
            what = f"of shape {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise ValueError(
                f"a residual {what}: the function of a Residual sees one point, and must return a number or a vector "
                "as a tensor"
            )
        return found

    def _u(self, *inputs: Tensor) -> Any:
        outputs = self.model(*inputs)
        return outputs.reshape(()) if isinstance(outputs, Tensor) and outputs.numel() == 1 else outputs
