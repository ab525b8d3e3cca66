"""What SOAP's noise floor protects and what it costs; docs/first-steps.md has the tables that this prints.

    python benchmarks/noise_floor.py
    python benchmarks/noise_floor.py --parts quadratics --rules soap,kl_soap,moso

All in float32 on one thread, without weight decay.

    quadratics  the loss ½ ‖A^½ (W - T) B^½‖² that is left after 400 steps, the learning rate falling to 0 by a cosine.
                A is 24 × 24 and B is 16 × 16, with the condition number's square root each, in random bases. The
                median of the seeds
    scaled      a perceptron for scikit-learn's digits, whose 64 pixels are scaled from 1 to 1e-3: training loss
    digits      the same without scales, one image a step: validation loss; the mean of the seeds
    one sample  gradients of rank one, as one sample gives: how far each update moves when they change by 1e-6 of
                themselves, relative to the update, and its root mean square at a learning rate of 1
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steepest.engine.optimizer import Optimizer
from steepest.lab.workloads.digits import Digits

FLOORS: dict[str, dict[str, Any]] = {"floor": {}, "no floor": {"noise_floor": 0.0}}
Make = Callable[[Iterable[Tensor], float], Optimizer]


def follow_cosine(optimizer: Optimizer, lr: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr / 2 * (1 + math.cos(math.pi * step / steps))


def quadratic(make: Make, condition: float, lr: float, seed: int, steps: int = 400) -> float:
    m, n = 24, 16
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    U, V = (torch.linalg.qr(randn(d, d)).Q for d in (m, n))
    a, b = (torch.logspace(0, -math.log10(condition) / 2, d, dtype=torch.float64) for d in (m, n))
    A, B, T = ((U * a) @ U.T).float(), ((V * b) @ V.T).float(), randn(m, n).float()
    W = nn.Parameter(torch.zeros(m, n))
    optimizer = make([W], lr)
    for step in range(steps):
        follow_cosine(optimizer, lr, step, steps)
        W.grad = A @ (W.detach() - T) @ B
        optimizer.step()
    error = U.T @ (W.detach() - T).double() @ V
    return (a[:, None] * b * error.square()).sum().item() / 2


def digits(make: Make, lr: float, seed: int, batch: int, steps: int, scaled: bool) -> float:
    data = Digits()
    inputs = data.inputs * torch.logspace(0, -3, 64) if scaled else data.inputs
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make(model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        follow_cosine(optimizer, lr, step, steps)
        images = torch.randint(data.held_out, len(inputs), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[images]), data.targets[images]).backward()
        optimizer.step()
    judged = slice(data.held_out, None) if scaled else slice(data.held_out)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(inputs[judged]), data.targets[judged]).item()


def one_sample(make: Make, m: int, n: int, steps: int) -> tuple[list[Tensor], list[float]]:
    """The updates, and how far each of them moves, relative to itself."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(d, 1, generator=generator) for d in (m, n)] for _ in range(steps)]
    updates = []
    for size in (0.0, 1e-6):
        W = nn.Parameter(torch.zeros(m, n))
        optimizer, moved = make([W], 1.0), []
        for x, y in pairs:
            before = W.detach().clone()
            W.grad = (x * (1 + size * torch.randn(m, 1, generator=generator))) @ y.T
            optimizer.step()
            moved.append(before - W.detach())
        updates.append(moved)
    plain, other = updates
    return plain, [((D - E).norm() / D.norm()).item() for D, E in zip(plain, other, strict=True)]


def line(name: str, values: Iterable[float], form: str = "10.1e") -> None:
    print(f"{name:34}" + "".join(format(value, form) for value in values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="quadratics,scaled,digits,one sample", help="which of the four, by commas")
    parser.add_argument("--rules", default="soap", help="soap, kl_soap or moso, by commas")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, {args.seeds} seeds")
    for rule in args.rules.split(","):
        for part in args.parts.split(","):
            measure(part, rule, range(args.seeds))


def measure(part: str, rule: str, seeds: range) -> None:
    every = {} if rule == "moso" else {"precondition_frequency": 1}
    for name, options in FLOORS.items():
        make = lambda params, lr: Optimizer(params, rule, lr=lr, weight_decay=0.0, **options)  # noqa: B023, E731
        each = lambda params, lr: Optimizer(params, rule, lr=lr, weight_decay=0.0, **every, **options)  # noqa: B023, E731
        if part == "quadratics":
            for lr in (0.1, 0.3):
                losses = [statistics.median(quadratic(make, c, lr, s) for s in seeds) for c in (1e4, 1e8, 1e12)]
                line(f"{rule}, {name}: 1e4, 1e8, 1e12; lr {lr}", losses)
        elif part in ("scaled", "digits"):
            scaled = part == "scaled"
            batch, steps, form = (128, 400, "10.4f") if scaled else (1, 300, "10.3f")
            rates = (3e-3, 1e-2, 3e-2)
            losses = [statistics.mean(digits(make, lr, s, batch, steps, scaled) for s in seeds) for lr in rates]
            line(f"{rule}, {name}: {part}, lr 3e-3, 1e-2, 3e-2", losses, form)
        else:
            for m, n in ((64, 64), (64, 256), (256, 256)):
                plain, moved = one_sample(each, m, n, 20)
                line(f"{rule}, {name}: {m}x{n}, moved", [moved[t - 1] for t in (1, 2, 5, 10, 20)])
                line("  root mean square", [plain[t - 1].square().mean().sqrt().item() for t in (1, 2, 5, 10, 20)])


if __name__ == "__main__":
    main()
