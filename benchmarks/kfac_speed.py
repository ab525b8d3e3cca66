"""What a training step of K-FAC takes on a CPU, beside SGD's and SOAP's, and how much of it is overhead over SGD's.

    python benchmarks/kfac_speed.py --out benchmarks/results/kfac_speed.json

Two networks, one thread, CPU time of the process. All optimizers take their steps in turn, so that whatever else runs
on the machine slows all of them; the mean over whole periods of refreshes is given, as a multiple of SGD's step.
kfac-pytorch joins in where it is installed (``pip install kfac-pytorch``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steepest

Step = Callable[[], None]


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    layers = (nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(*layers), torch.randn(256, 256), torch.randint(10, (256,))


def cnn() -> tuple[nn.Module, Tensor, Tensor]:
    body = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*body, *head), torch.randn(128, 1, 16, 16), torch.randint(10, (128,))


NETS = {"mlp": mlp, "cnn": cnn}


def kfac(kind: type[Any], statistics: int, refresh: int, **options: Any) -> Callable[[nn.Module], Any]:
    """Build one of ours, past its first steps."""
    every = {"statistics_frequency": statistics, "precondition_frequency": refresh, "settle": 0}
    return lambda model: kind(model, lr=0.1, **every, **options)


OPTIMIZERS: dict[str, tuple[int, Callable[[nn.Module], Any]]] = {
    "sgd": (1, lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)),
    "detached": (1, lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)),
    "inverse, every 1": (1, kfac(steepest.KFAC, 1, 1)),
    "inverse, every 10": (10, kfac(steepest.KFAC, 10, 10)),
    "inverse, 10 and 100": (100, kfac(steepest.KFAC, 10, 100)),
    "inverse, 5 and 20": (20, kfac(steepest.KFAC, 5, 20)),
    "eigen, every 10": (10, kfac(steepest.KFAC, 10, 10, form="eigen")),
    "eigen, every 10, eigh": (10, kfac(steepest.KFAC, 10, 10, form="eigen", solver="eigh")),
    "ekfac, every 10": (10, kfac(steepest.EKFAC, 10, 10)),
    "soap, every 1": (1, lambda model: steepest.for_model(model, "soap", lr=1e-3, precondition_frequency=1)),
    "soap, every 10": (10, lambda model: steepest.for_model(model, "soap", lr=1e-3, precondition_frequency=10)),
}
"""Each with the number of steps in its period."""


def peer(every: int) -> Callable[[nn.Module], Any]:
    """Build kfac-pytorch's inverse form, which wants its own step before that of SGD."""

    def build(model: nn.Module) -> Any:
        from kfac.preconditioner import KFACPreconditioner  # type: ignore[import-not-found]

        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        options = {"factor_update_steps": every, "inv_update_steps": every, "compute_method": "inverse"}
        preconditioner = KFACPreconditioner(model, **options)
        step = sgd.step
        sgd.step = lambda: (preconditioner.step(), step())  # type: ignore[method-assign, assignment]
        return sgd

    return build


def stepper(net: str, build: Callable[[nn.Module], Any], detached: bool) -> Step:
    """Make a training of its own, and return its step; if ``detached``, a K-FAC has been on the model before."""
    torch.manual_seed(0)
    model, x, y = NETS[net]()
    if detached:
        steepest.KFAC(model).detach()
    optimizer = build(model)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure(net: str, rounds: int) -> dict[str, float]:
    """Return the milliseconds of a step of each optimizer, averaged over periods."""
    optimizers = dict(OPTIMIZERS)
    if find_spec("kfac"):
        optimizers |= {f"kfac-pytorch, every {every}": (every, peer(every)) for every in (1, 10)}
    steps = {name: stepper(net, build, name == "detached") for name, (_, build) in optimizers.items()}
    for name, step in steps.items():
        for _ in range(2 * min(optimizers[name][0], 10)):
            step()
    spent = dict.fromkeys(steps, 0.0)
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            spent[name] += time.process_time() - start
    return {name: 1e3 * seconds / rounds for name, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="steps of each, best a multiple of 100 (default: 200)")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for net in NETS:
        found[net] = measure(net, arguments.rounds)
        print(net)
        for name, milliseconds in found[net].items():
            print(f"  {name:<24}{milliseconds:8.2f} ms{milliseconds / found[net]['sgd']:8.2f} steps of SGD")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
