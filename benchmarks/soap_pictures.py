"""SOAP on problems that are small enough to look at; docs/soap-in-ten-minutes.md is about what this draws and prints.

    python benchmarks/soap_pictures.py            # 20 seconds; prints the page's figures
    python benchmarks/soap_pictures.py --plot     # draws docs/soap-*.svg, too; needs matplotlib

Every loss is ½ ‖A (W - W*) B‖², whose Hessian is the Kronecker product of A Aᵀ and B Bᵀ. These are diagonal, or
rotated. Everything is seeded, so the figures come again to the last digit on the same machine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steepest

DOCS = Path(__file__).parents[1] / "docs"
Make = Callable[..., torch.optim.Optimizer]
Panels = dict[str, tuple[Tensor, list[float]]]
Curves = dict[tuple[str, bool], tuple[float, list[float]]]
ADAM: Make = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0)
SOAP: Make = partial(steepest.SOAP, weight_decay=0.0)
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SIDE, CONDITION, STEPS, NOISE = 24, 1e3, 200, 0.1
BLUE, ORANGE, GREY = "#3949ab", "#ef6c00", "#9e9e9e"


# A valley of two weights.


def valley(degrees: float) -> Tensor:
    """Return a 2 × 2 Hessian with eigenvalues 1 and 50, whose eigenvectors are turned from the axes."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    Q = torch.tensor([[c, -s], [s, c]])
    return Q @ torch.diag(torch.tensor([1.0, 50.0])) @ Q.T


def path(make: Make, degrees: float, steps: int = 40) -> tuple[Tensor, list[float]]:
    """Return the weights [steps + 1, 2] of a descent into the valley, from a start that turns along, and its losses."""
    H, turn = valley(degrees), math.radians(degrees)
    start = torch.tensor([[-2.0 * math.cos(turn) - 0.6 * math.sin(turn), -2.0 * math.sin(turn) + 0.6 * math.cos(turn)]])
    W = torch.nn.Parameter(start)  # [1, 2]
    optimizer, points, losses = make([W], lr=0.1), [], []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps + 1):
        points.append(W.detach().clone().flatten())
        losses.append(float(W.detach() @ H @ W.detach().T) / 2)
        if step < steps:
            W.grad = W.detach() @ H
            optimizer.step()
            schedule.step()
    return torch.stack(points), losses


# A basis, and what a refresh does to it.


def refreshes(every: int = 10, steps: int = 60) -> tuple[list[float], dict[str, Tensor]]:
    """Return the share of a drifting covariance off the diagonal at each step, and three pictures of one refresh."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    mix = draw(16, 16) * torch.logspace(0, -1.5, 16)
    drift = draw(16, 16)
    factors = steepest.init_kronecker_factors((16, 16))
    shares, seen = [], {}
    bases: list[Tensor] = []
    for step in range(steps + 1):
        towards = (mix + 0.02 * step * drift * torch.logspace(0, -1.5, 16)) @ draw(16, 64) / 8
        steepest.update_kronecker_factors(factors, towards[:, :16], shampoo_beta=0.9)
        if not bases:
            bases = steepest.get_eigenbasis_eigh(factors)
        elif step % every == 0:
            if step == steps:
                seen["before the refresh"] = steepest.conjugate(factors[0], bases[0])
            bases = refreshed(factors, bases)
            if step == steps:
                seen["after it"] = steepest.conjugate(factors[0], bases[0])
                seen["after a second"] = steepest.conjugate(factors[0], refreshed(factors, bases)[0])
        shares.append(off_diagonal(steepest.conjugate(factors[0], bases[0])))
    return shares, seen


def refreshed(factors: Any, bases: list[Tensor]) -> list[Tensor]:
    """Return the bases after one orthogonal iteration."""
    return steepest.get_eigenbasis_qr(factors, bases, torch.ones(16, 16))[0]


def off_diagonal(K: Tensor) -> float:
    """Return the part of a matrix' norm that stands off its diagonal."""
    return float((K - torch.diag(K.diagonal())).norm() / K.norm())


# A matrix, with noisy gradients.


def root(rotated: bool, seed: int) -> Tensor:
    """Return a square root of a covariance whose eigenvalues lie between 1 and 1 / CONDITION."""
    D = torch.diag(torch.logspace(0, -math.log10(CONDITION) / 2, SIDE))
    Q = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))).Q
    return Q @ D if rotated else D


def descent(make: Make, rotated: bool, lr: float, seed: int = 0) -> list[float]:
    """Return the losses of a matrix that is trained from 0, with a rate that falls to 0, divided by the first."""
    A, B = root(rotated, 1), root(rotated, 2)
    H_L, H_R = A @ A.T, B @ B.T
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, SIDE, SIDE, generator=generator)
    target = (A @ torch.linalg.inv(root(False, 1))).mm(draw()).mm((B @ torch.linalg.inv(root(False, 2))).T)
    W = torch.nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer, losses = make([W], lr=lr), []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(STEPS + 1):
        error = W.detach() - target
        losses.append(float((A.T @ error @ B).square().sum()) / 2)
        if step < STEPS:
            W.grad = H_L @ error @ H_R + NOISE * A @ draw() @ B.T / SIDE
            optimizer.step()
            schedule.step()
    return [loss / losses[0] for loss in losses]


def best(make: Make, rotated: bool) -> tuple[float, list[float]]:
    """Return the learning rate of `RATES` with the least loss at the end, and its losses."""
    curves = {lr: descent(make, rotated, lr) for lr in RATES}
    lr = min(curves, key=lambda lr: curves[lr][-1])
    return lr, curves[lr]


# Pictures.


def draw_all(panels: Panels, shares: list[float], seen: dict[str, Tensor], curves: Curves) -> None:
    """Write the page's three pictures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "steepest", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False}
    )
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.titlesize": 11, "axes.titleweight": "bold"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.5), sharex=True, sharey=True, layout="constrained")
    for ax, (name, (points, losses)) in zip(axes, panels.items(), strict=True):
        draw_valley(ax, 45 if "45" in name else 0)
        ax.plot(*points.T, "o-", ms=3, lw=1.2, color=ORANGE if name.startswith("SOAP") else BLUE)
        ax.set_title(f"{name}\nloss {losses[0]:.0f} → {losses[-1]:.2g}")
    save(figure, "basis")

    figure, axes = pyplot.subplots(
        1, 4, figsize=(10, 2.9), layout="constrained", gridspec_kw={"width_ratios": [1, 1, 1, 1.9]}
    )
    for ax, (name, K) in zip(axes, seen.items(), strict=False):
        ax.imshow((K.abs() / K.abs().max()).clamp(1e-4).log10(), cmap="Blues", vmin=-4, vmax=0)
        ax.set(xticks=[], yticks=[], title=name, xlabel=f"off the diagonal: {off_diagonal(K):.1%}")
    axes[3].plot(shares, color=BLUE)
    axes[3].set(xlabel="step; a refresh every 10", title="the share off the diagonal", ylim=(0, None))
    axes[3].yaxis.set_major_formatter("{x:.0%}")
    save(figure, "refresh")

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for ax, rotated in zip(axes, (False, True), strict=True):
        for name, colour in (("Adam", BLUE), ("SOAP", ORANGE)):
            lr, losses = curves[name, rotated]
            ax.plot(losses, color=colour, label=f"{name}, best of {len(RATES)} rates: {lr}")
        ax.set(yscale="log", xlabel="step", title="rotated" if rotated else "along the axes")
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, loc="upper right")
    axes[0].set_ylabel("loss / loss at the start")
    save(figure, "loss")


def draw_valley(ax: Any, degrees: float) -> None:
    """Draw the contours of a valley, and the directions of its eigenvectors."""
    x = torch.linspace(-2.6, 1.2, 200)
    X, Y = torch.meshgrid(x, x, indexing="xy")
    H = valley(degrees)
    loss = (H[0, 0] * X**2 + 2 * H[0, 1] * X * Y + H[1, 1] * Y**2) / 2
    ax.contour(X, Y, loss, levels=[0.05, 0.5, 2, 6, 15, 40], colors=GREY, linewidths=0.7)
    ax.plot(0, 0, "*", color="black", ms=9, zorder=5)
    ax.set(aspect="equal", xticks=[], yticks=[])


def save(figure: Any, name: str) -> None:
    """Write a picture beside its page."""
    figure.savefig(DOCS / f"soap-{name}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw docs/soap-*.svg, too")
    plot = parser.parse_args().plot
    torch.set_num_threads(1)

    panels = {
        "Adam, valley along an axis": path(ADAM, 0),
        "Adam, valley at 45°": path(ADAM, 45),
        "SOAP, valley at 45°": path(partial(SOAP, precondition_1d=True), 45),
    }
    for name, (_, losses) in panels.items():
        print(f"{name:<28} loss at the start {losses[0]:.2g}, after 40 steps {losses[-1]:.2g}")
    shares, seen = refreshes()
    for name, K in seen.items():
        print(f"off the diagonal {name:<20} {off_diagonal(K):.3f}")
    curves: Curves = {}
    for rotated in (False, True):
        for name, make in (("Adam", ADAM), ("SOAP", SOAP)):
            lr, losses = curves[name, rotated] = best(make, rotated)
            where = "rotated" if rotated else "along the axes"
            print(f"{name}, {where:<15} best lr {lr:<5} loss at the end / at the start: {losses[-1]:.2g}")
    if plot:
        draw_all(panels, shares, seen, curves)


if __name__ == "__main__":
    main()
