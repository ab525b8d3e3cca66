"""Two differential equations for networks, with the solutions that they are to find.

Poisson's: ``-Δu = f`` on the unit square, ``u = 0`` on its edge, where ``f`` is such that ``u = sin πx sin πy``.

Burgers': ``u_t + u u_x = ν u_xx`` for t in [0, 1] and x in [-1, 1], where ``u = -sin πx`` at t = 0, and ``u = 0`` at
x = ±1. For ν = 0.02 a steep front forms in the middle. The solution is Cole's and Hopf's: with
``f(y) = exp(-cos(πy) / 2πν)`` and z Gaussian of mean 0 and variance 2νt,

    u(t, x) = -E[sin(π(x - z)) f(x - z)] / E[f(x - z)]

Each problem comes twice: as `steepest.Residual`s, functions of one point for Gauss-Newton, and as a loss of all points
at once, which is the fastest form for the other optimizers. tests/newton/test_residual.py compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vjp

from steepest.newton.residual import Residual

NU = 0.02
"""Viscosity of Burgers' equation."""


@dataclass(frozen=True)
class Problem:
    """An equation, a network for its solution, and the solution."""

    widths: tuple[int, ...]
    """Of the network's layers, from the inputs to the output."""
    residuals: list[Residual]
    loss: Callable[[nn.Module], Tensor]
    """Half the weighted mean squares of all residuals, as a scalar in the model's graph."""
    points: Tensor
    """Where the error is measured, ``[n, 2]``; the residuals have other points."""
    truth: Tensor
    """The solution there, ``[n]``."""

    def network(self) -> nn.Sequential:
        """Return a fresh perceptron with tanh in float64, by torch's own initialization from its global state."""
        layers: list[nn.Module] = []
        for a, b in pairwise(self.widths):
            layers += [nn.Linear(a, b, dtype=torch.float64), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """Return the relative L2 error of a network, ``‖u - truth‖ / ‖truth‖`` over `points`."""
        distance = model(self.points).squeeze(-1) - self.truth
        return float(distance.norm() / self.truth.norm())


def poisson() -> Problem:
    """Return Poisson's equation: 576 points inside, 96 on the edge, 697 parameters."""
    inside = grid(centers(0, 1, 24), centers(0, 1, 24))
    side, zero, one = centers(0, 1, 24), torch.zeros(24, dtype=torch.float64), torch.ones(24, dtype=torch.float64)
    edge = torch.cat([torch.stack(pair, 1) for pair in ((side, zero), (side, one), (zero, side), (one, side))])
    source = 2 * math.pi**2 * sines(inside)

    def equation(u: Callable[[Tensor], Tensor], x: Tensor, f: Tensor) -> Tensor:
        pull = vjp(grad(u), x)[1]  # from e to the Hessian's product with it
        laplacian: Tensor = sum(pull(e)[0] @ e for e in torch.eye(2, dtype=x.dtype))
        return laplacian + f

    def boundary(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return u(x)

    def loss(model: nn.Module) -> Tensor:
        x = inside.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)  # [n, 2]
        laplacian = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return (half_mean_square(laplacian + source)) + half_mean_square(model(edge))

    points = grid(torch.linspace(0, 1, 101, dtype=torch.float64), torch.linspace(0, 1, 101, dtype=torch.float64))
    residuals = [Residual(equation, inside, source), Residual(boundary, edge)]
    return Problem((2, 24, 24, 1), residuals, loss, points, sines(points))


def burgers() -> Problem:
    """Return Burgers' equation: 1200 points inside, 80 at the start, 80 on the edges, 921 parameters."""
    inside = grid(centers(0, 1, 20), centers(-1, 1, 60))  # of (t, x); with 40 across, the front is missed
    start = grid(torch.zeros(1, dtype=torch.float64), centers(-1, 1, 80))
    edge = grid(centers(0, 1, 40), torch.tensor([-1.0, 1.0], dtype=torch.float64))

    def equation(u: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        def slope(p: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            g, value = grad_and_value(u)(p)
            return g[1], (value, g)

        curvature, (value, first) = grad(slope, has_aux=True)(p)
        left: Tensor = first[0] + value * first[1] - NU * curvature[1]
        return left

    def initial(u: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        return u(p) + (math.pi * p[1]).sin()

    def boundary(u: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        return u(p)

    def loss(model: nn.Module) -> Tensor:
        p = inside.clone().requires_grad_()
        u = model(p).squeeze(-1)
        (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)  # [n, 2]
        (h,) = torch.autograd.grad(g[:, 1].sum(), p, create_graph=True)
        left = half_mean_square(g[:, 0] + u * g[:, 1] - NU * h[:, 1])
        at_start = half_mean_square(model(start).squeeze(-1) + (math.pi * start[:, 1]).sin())
        return left + at_start + half_mean_square(model(edge))

    points = grid(torch.linspace(0, 1, 51, dtype=torch.float64), torch.linspace(-1, 1, 201, dtype=torch.float64))
    residuals = [Residual(equation, inside), Residual(initial, start), Residual(boundary, edge)]
    return Problem((2, 20, 20, 20, 1), residuals, loss, points, cole_hopf(points))


PROBLEMS: dict[str, Callable[[], Problem]] = {"poisson": poisson, "burgers": burgers}
"""The problems by name."""


def sines(points: Tensor) -> Tensor:
    """Return ``sin πx sin πy`` at points ``[n, 2]``."""
    return (math.pi * points).sin().prod(1)


def cole_hopf(points: Tensor) -> Tensor:
    """Return the solution of Burgers' equation at points (t, x) ``[n, 2]``.

    The trapezoidal rule from -9 to 9 standard deviations is exact to rounding for integrals as smooth as these.

    >>> cole_hopf(torch.tensor([[0.0, 0.5], [1.0, 0.0]], dtype=torch.float64)).round(decimals=12).abs().tolist()
    [1.0, 0.0]
    """
    t, x = points[:, :1], points[:, 1:]
    z = torch.linspace(-9, 9, 200, dtype=torch.float64)  # [q]
    y = x - (2 * NU * t).sqrt() * z  # [n, q]
    weights = (-z.square() / 2 - (math.pi * y).cos() / (2 * math.pi * NU)).exp()
    return -((math.pi * y).sin() * weights).sum(1) / weights.sum(1)


def half_mean_square(r: Tensor) -> Tensor:
    """Return ``½ mean r²``."""
    return r.square().mean() / 2


def centers(low: float, high: float, count: int) -> Tensor:
    """Return the centers of ``count`` equal intervals.

    >>> centers(0, 1, 2).tolist()
    [0.25, 0.75]
    """
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def grid(a: Tensor, b: Tensor) -> Tensor:
    """Return all pairs of numbers of ``a`` and ``b``, ``[len(a) · len(b), 2]``."""
    return torch.cartesian_prod(a, b)
