"""SOAP's first steps with and without its guards; docs/first-steps.md is about what this prints.

    python benchmarks/first_steps.py
    python benchmarks/first_steps.py --shapes 64x256 --steps 10 --trace

Gradients are independent and Gaussian, the learning rate is 1, nothing decays. For each shape and setting:

    to polar   ‖D₁ - U Vᵀ‖ / ‖U Vᵀ‖: how far the first update is from the polar factor of the first gradient
    1e-6       ‖D₁' - D₁‖ / ‖D₁‖, where every entry of the gradient was changed by 1e-6 of itself: what rounding decides
    max rms    the largest root mean square of an update in the first steps

With ``--trace`` the root mean square of each update follows. Under ``basis_timing="after"`` the first gradient moves
nothing, so the first two columns are about the second, and there is no polar factor to compare with.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import steepest

SHAPES = "16x16,64x64,64x256,256x64,256x256,64x1024,256x1024"
SETTINGS: dict[str, dict[str, Any]] = {
    "both guards": {},
    "noise floor only": {"momentum_floor": False},
    "momentum floor only": {"noise_floor": 0.0},
    "no guards": {"momentum_floor": False, "noise_floor": 0.0},
    'no guards, "after"': {"momentum_floor": False, "noise_floor": 0.0, "basis_timing": "after"},
    'both guards, "after"': {"basis_timing": "after"},
}


def gradients(shape: tuple[int, int], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def perturbed(grads: list[Tensor], size: float = 1e-6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [G * (1 + size * torch.randn(G.shape, generator=generator)) for G in grads]


def updates(grads: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """What each gradient moves; a first one that only seeds the basis is left out."""
    W = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = steepest.SOAP([W], lr=1.0, weight_decay=0.0, precondition_frequency=1, **options)
    moved = []
    for G in grads:
        before = W.detach().clone()
        W.grad = G
        optimizer.step()
        moved.append(before - W.detach())
    return moved[1:] if options.get("basis_timing") == "after" else moved


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def polar(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return (U @ Vh).float()


def rms(D: Tensor) -> float:
    return D.square().mean().sqrt().item()


def row(grads: list[Tensor], options: dict[str, Any], trace: bool) -> str:
    moved = updates(grads, options)
    seeds = len(grads) - len(moved)
    to_polar = f"{'–':>10}" if seeds else f"{distance(moved[0], polar(grads[0])):10.3f}"
    effect = distance(updates(perturbed(grads[: seeds + 1]), options)[0], moved[0])
    sizes = [rms(D) for D in moved]
    line = f"{to_polar}{effect:10.1e}{max(sizes):10.2f}"
    return line + "   " + " ".join(f"{size:.2f}" for size in sizes) if trace else line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="as in 64x256,256x256")
    parser.add_argument("--steps", type=int, default=20, help="updates per shape and setting")
    parser.add_argument("--trace", action="store_true", help="print the root mean square of every update")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, {args.steps} steps")
    print(f"{'shape':12}{'setting':22}{'to polar':>10}{'1e-6':>10}{'max rms':>10}")
    for text in args.shapes.split(","):
        m, _, n = text.partition("x")
        grads = gradients((int(m), int(n)), args.steps)
        for name, options in SETTINGS.items():
            print(f"{text:12}{name:22}{row(grads, options, args.trace)}", flush=True)


if __name__ == "__main__":
    main()
