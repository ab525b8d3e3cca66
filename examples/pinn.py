"""Solve the heat equation with a network, and find its unknown coefficient from twenty measurements.

    python examples/pinn.py

The network u(t, x) and the coefficient k are trained together, by Gauss-Newton, to satisfy

    u_t = k u_xx             for t and x from 0 to 1
    u = sin πx               at t = 0
    u = 0                    at x = 0 and x = 1
    u = what was measured    at twenty points

The measurements are of ``exp(-k π² t) sin πx`` with k = 0.3. A minute suffices, on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad

import steepest

TRUE_K = 0.3


class Heat(nn.Module):
    """A network u(t, x), and the coefficient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
        self.k = nn.Parameter(torch.tensor(1.0))

    def forward(self, point: Tensor) -> Tensor:
        """Return u ``[..., 1]`` at points (t, x), ``[..., 2]``."""
        return self.net(point)


def truth(points: Tensor) -> Tensor:
    """Return the solution at points ``[n, 2]``."""
    t, x = points.T
    return (-TRUE_K * math.pi**2 * t).exp() * (math.pi * x).sin()


def residuals(model: Heat) -> list[steepest.Residual]:
    """Return what must vanish, each as a function of the network and one point."""

    def equation(u: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
        def slope(point: Tensor) -> tuple[Tensor, Tensor]:
            first = grad(u)(point)
            return first[1], first[0]  # u_x is differentiated once more

        second, u_t = grad(slope, has_aux=True)(point)
        return u_t - model.k * second[1]

    def difference(u: Callable[[Tensor], Tensor], point: Tensor, value: Tensor) -> Tensor:
        return u(point) - value

    line = (torch.arange(20) + 0.5) / 20
    zero, one = torch.zeros(1), torch.ones(1)
    start = torch.cartesian_prod(zero, line)
    edges = torch.cartesian_prod(line, torch.cat([zero, one]))
    measured = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    return [
        steepest.Residual(equation, torch.cartesian_prod(line, line)),
        steepest.Residual(difference, start, truth(start)),
        steepest.Residual(difference, edges, torch.zeros(len(edges))),
        steepest.Residual(difference, measured, truth(measured)),
    ]


def main(arguments: list[str] | None = None) -> float:
    """Train, print how it goes, and return the coefficient that was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)  # Gauss-Newton uses the digits that float32 doesn't have
    torch.manual_seed(0)
    model = Heat()
    parts = residuals(model)
    optimizer = steepest.GaussNewton(model)
    everywhere = torch.cartesian_prod(*[torch.linspace(0, 1, 41)] * 2)
    for step in range(args.steps + 1):
        if step % 10 == 0:
            with torch.no_grad():
                error = (model(everywhere)[:, 0] - truth(everywhere)).abs().max()
            print(f"step {step:3}   k = {model.k.item():.10f}   largest error of u = {error:.1e}")
        loss = optimizer.step(parts)
    print(f"loss {loss:.1e}, {optimizer!r}")
    return model.k.item()


if __name__ == "__main__":
    main()
