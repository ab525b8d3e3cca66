"""What a call of ``optimizer.diagnostics()`` costs, as a share of the steps between two calls.

    python benchmarks/diagnostics.py
    python benchmarks/diagnostics.py --width 512 --every 100

Steps of a GPT of two layers, with gradients drawn anew for every step, by each optimizer in turn: so many steps, then a
call. Times are CPU times of one thread; the model's own passes, of which a
training mostly consists, count nothing, so in a training the share is smaller. Shown are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import steepest

OPTIMIZERS = ("soap", "kl-soap", "muon", "shampoo")


def gpt(width: int) -> nn.Module:
    """Return the parameters of a GPT of two layers."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(2)]
    return nn.Sequential(nn.Embedding(100, width), *layers, nn.Linear(width, 100))


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call, in seconds."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(width: int, every: int, rounds: int, per_parameter: bool) -> dict[str, tuple[float, float]]:
    """Return the median seconds of ``every`` steps, and of the call that follows them, by optimizer."""
    models = {name: gpt(width) for name in OPTIMIZERS}
    optimizers = {name: steepest.for_model(model, name, lr=1e-3) for name, model in models.items()}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
    for _ in range(rounds + 1):
        for name, optimizer in optimizers.items():
            steps = 0.0
            for _ in range(every):
                for p in models[name].parameters():
                    p.grad = 1e-2 * torch.randn_like(p)
                steps += seconds(optimizer.step)
            spent[name].append((steps, seconds(partial(optimizer.diagnostics, per_parameter))))
    # The first round has first refreshes, and a first call, which has no directions.
    return {
        name: (statistics.median(steps for steps, _ in times[1:]), statistics.median(call for _, call in times[1:]))
        for name, times in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of the GPT")
    parser.add_argument("--every", type=int, default=10, help="steps between two calls")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each optimizer that are measured")
    parser.add_argument("--per-parameter", action="store_true", help="have each parameter shown, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'optimizer':12}{'a step':>12}{'a call':>12}{f'a call every {options.every} steps':>28}")
    for name, (steps, call) in measure(options.width, options.every, options.rounds, options.per_parameter).items():
        print(f"{name:12}{1e3 * steps / options.every:>9.1f} ms{1e3 * call:>9.1f} ms{call / steps:>28.1%}")


if __name__ == "__main__":
    main()
