"""What SOAP's noise floor protects and what it costs; docs/first-steps.md has the tables that this prints.

    python benchmarks/noise_floor.py
    python benchmarks/noise_floor.py --parts quadratics --rules soap,kl_soap
    python benchmarks/noise_floor.py --parts quadratics --falls 0,1,1.5,2,off --rates 0.1

All in float32 on one thread, without weight decay. The floor falls as 1 / t^p with the updates t; 1.5 is how it is
built, other p are had by an option that grows with t, and "off" is none.

    quadratics  the loss ½ ‖A^½ (W - T) B^½‖² that is left after 400 steps, the learning rate falling to 0 by a cosine.
                A is 24 × 24 and B is 16 × 16, with the condition number's square root each, in random bases; the
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
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steepest.engine.optimizer import Optimizer
from steepest.lab.workloads.digits import Digits


class Setting:
    """A rule, and how its noise floor falls."""

    def __init__(self, rule: str, fall: str, **options: Any) -> None:
        self.rule, self.fall, self.options = rule, fall, options

    def optimizer(self, params: Iterable[Tensor]) -> Optimizer:
        """An optimizer with weight decay 0; each step sets its rate."""
        return Optimizer(params, self.rule, lr=0.0, weight_decay=0.0, **self.options)

    def step(self, optimizer: Optimizer, t: int, lr: float) -> None:
        """Take step t, from 1 on."""
        for group in optimizer.param_groups:
            τ = optimizer.defaults["noise_floor"]
            group["noise_floor"] = 0.0 if self.fall == "off" else τ * t ** (1.5 - float(self.fall))
            group["lr"] = lr
        optimizer.step()


def cosine(lr: float, t: int, steps: int) -> float:
    return lr / 2 * (1 + math.cos(math.pi * (t - 1) / steps))


def quadratic(setting: Setting, condition: float, lr: float, seed: int, steps: int = 400) -> float:
    m, n = 24, 16
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    U, V = (torch.linalg.qr(randn(d, d)).Q for d in (m, n))
    a, b = (torch.logspace(0, -math.log10(condition) / 2, d, dtype=torch.float64) for d in (m, n))
    A, B, T = ((U * a) @ U.T).float(), ((V * b) @ V.T).float(), randn(m, n).float()
    W = nn.Parameter(torch.zeros(m, n))
    optimizer = setting.optimizer([W])
    for t in range(1, steps + 1):
        W.grad = A @ (W.detach() - T) @ B
        setting.step(optimizer, t, cosine(lr, t, steps))
    error = U.T @ (W.detach() - T).double() @ V
    return (a[:, None] * b * error.square()).sum().item() / 2


def digits(setting: Setting, lr: float, seed: int, batch: int, steps: int, scaled: bool) -> float:
    data = Digits()
    inputs = data.inputs * torch.logspace(0, -3, 64) if scaled else data.inputs
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = setting.optimizer(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for t in range(1, steps + 1):
        images = torch.randint(data.held_out, len(inputs), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[images]), data.targets[images]).backward()
        setting.step(optimizer, t, cosine(lr, t, steps))
    judged = slice(data.held_out, None) if scaled else slice(data.held_out)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(inputs[judged]), data.targets[judged]).item()


def one_sample(setting: Setting, m: int, n: int, steps: int) -> tuple[list[Tensor], list[float]]:
    """The updates, and how far each of them moves, relative to itself."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(d, 1, generator=generator) for d in (m, n)] for _ in range(steps)]
    updates = []
    for size in (0.0, 1e-6):
        W = nn.Parameter(torch.zeros(m, n))
        optimizer, moved = setting.optimizer([W]), []
        for t, (x, y) in enumerate(pairs, start=1):
            before = W.detach().clone()
            W.grad = (x * (1 + size * torch.randn(m, 1, generator=generator))) @ y.T
            setting.step(optimizer, t, 1.0)
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
    parser.add_argument("--falls", default="1.5,off", help="exponents with which the floor falls, or off, by commas")
    parser.add_argument("--rates", default="", help="learning rates, by commas; each part has its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, {args.seeds} seeds")
    for rule in args.rules.split(","):
        for part in args.parts.split(","):
            for fall in args.falls.split(","):
                rates = [float(rate) for rate in args.rates.split(",")] if args.rates else []
                measure(part, rule, fall, range(args.seeds), rates)


def measure(part: str, rule: str, fall: str, seeds: range, rates: list[float]) -> None:
    setting, name = Setting(rule, fall), f"{rule}, fall {fall}"
    if part == "quadratics":
        for lr in rates or (0.1, 0.3):
            losses = [statistics.median(quadratic(setting, c, lr, s) for s in seeds) for c in (1e4, 1e8, 1e12)]
            line(f"{name}: lr {lr}", losses)
    elif part in ("scaled", "digits"):
        scaled = part == "scaled"
        batch, steps = (128, 400) if scaled else (1, 300)
        for lr in rates or (3e-3, 1e-2, 3e-2):
            loss = statistics.mean(digits(setting, lr, s, batch, steps, scaled) for s in seeds)
            line(f"{name}: {part}, lr {lr}", [loss], "10.4f")
    else:
        every = {} if rule == "moso" else {"precondition_frequency": 1}
        for m, n in ((64, 64), (64, 256), (256, 256)):
            plain, moved = one_sample(Setting(rule, fall, **every), m, n, 20)
            line(f"{name}: {m}x{n}, moved", [moved[t - 1] for t in (1, 5, 20)])
            line("  root mean square", [plain[t - 1].square().mean().sqrt().item() for t in (1, 5, 20)])


if __name__ == "__main__":
    main()
