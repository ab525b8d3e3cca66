"""Solve Poisson's equation with a network, to an error of 1e-7.

    python examples/poisson.py
    python examples/poisson.py --plot poisson.png    # draws the solution and its error, too; needs matplotlib

The network u(x, y) is trained by Gauss-Newton to satisfy

    -Δu = 2π² sin πx sin πy    on the unit square
    u   = 0                    on its edges

whose solution is ``sin πx sin πy``. It takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

import steepest

FINE = 101  # points on a side of the grid on which the error is measured


def solution(points: Tensor) -> Tensor:
    """Return the exact solution at points ``[n, 2]``."""
    return (math.pi * points).sin().prod(dim=1)


def equation(u: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Return by how much the equation fails at one point."""
    curvature = vjp(grad(u), point)[1]
    laplacian = sum(curvature(e)[0] @ e for e in torch.eye(2, dtype=point.dtype))
    return laplacian + 2 * math.pi**2 * (math.pi * point).sin().prod()


def boundary(u: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Return by how much the boundary's value fails at one point."""
    return u(point)


def residuals() -> list[steepest.Residual]:
    """Return both, at 24 × 24 points inside and 24 on each edge."""
    line, ends = (torch.arange(24) + 0.5) / 24, torch.tensor([0.0, 1.0])
    edges = torch.cat([torch.cartesian_prod(line, ends), torch.cartesian_prod(ends, line)])
    return [steepest.Residual(equation, torch.cartesian_prod(line, line)), steepest.Residual(boundary, edges)]


def draw(found: Tensor, exact: Tensor, errors: list[tuple[int, float]], file: Path) -> None:
    """Draw the solution, its error, and how the error fell."""
    from matplotlib import colors, pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=[1, 1, 1.3])
    error = (found - exact).abs().clamp(min=1e-10)
    maps = [("u, the network's solution", found, None), ("|u - sin πx sin πy|", error, colors.LogNorm())]
    for ax, (title, values, norm) in zip(axes, maps, strict=False):
        image = ax.imshow(values.reshape(FINE, FINE).T.numpy(), origin="lower", extent=(0, 1, 0, 1), norm=norm)
        figure.colorbar(image, ax=ax, shrink=0.85)
        ax.set(title=title, xlabel="x", ylabel="y")
    axes[2].semilogy(*zip(*errors, strict=True))
    axes[2].set(title="relative error of u", xlabel="step")
    axes[2].grid(alpha=0.3)
    figure.savefig(file, dpi=90)


def main(arguments: list[str] | None = None) -> float:
    """Train, print how it goes, and return the relative L2 error of the solution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture: .png, .svg or .pdf")
    args = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)  # float32 ends near 1e-5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    parts = residuals()
    optimizer = steepest.GaussNewton(model)
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, FINE)] * 2)
    exact = solution(grid)
    errors = []
    for step in range(args.steps + 1):
        with torch.no_grad():
            found = model(grid)[:, 0]
        errors.append((step, ((found - exact).norm() / exact.norm()).item()))
        if step % 20 == 0:
            print(f"step {step:3}   relative error of u = {errors[-1][1]:.1e}")
        if step < args.steps:
            optimizer.step(parts)
    if args.plot:
        draw(found, exact, errors, args.plot)
    return errors[-1][1]


if __name__ == "__main__":
    main()
