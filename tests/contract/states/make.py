"""Makes the states of optimizers in the middle of training, as a steepest of 2026 wrote them in format 1.

    python tests/contract/states/make.py format_1.pt

The files are made once: later versions must load them as they are. Where a later version trains on otherwise, only the
weights at the end are renewed. test_loading.py trains on from the files, and makes them anew beside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steepest

FOLDER = Path(__file__).parent
SHAPES = {"attention": (4, 3), "experts": (2, 2, 3), "head": (3, 4), "norm": (4,)}
BEFORE, AFTER = 3, 3


def start() -> tuple[dict[str, nn.Parameter], steepest.Optimizer]:
    """Four parameters under three rules. Nothing here comes from a random generator, whose numbers may change."""
    params = {name: nn.Parameter(waves(shape, k)) for k, (name, shape) in enumerate(SHAPES.items())}
    soap, experts, muon, adamw = ([(name, p)] for name, p in params.items())
    groups: list[dict[str, Any]] = [
        {"params": soap, "rule": "soap", "precondition_frequency": 2, "solver": "eigh"},
        {"params": experts, "rule": "soap", "precondition_frequency": 1, "merge_dims": False},
        {"params": muon, "rule": "muon"},
        {"params": adamw, "rule": "adamw", "weight_decay": 0.0},
    ]
    return params, steepest.Optimizer(groups, lr=0.05)


def start_kl() -> tuple[dict[str, nn.Parameter], steepest.Optimizer]:
    """KL's covariances, which format 1 had as an option of SOAP and Shampoo, and guards of which one is off."""
    params = {name: nn.Parameter(waves(shape, k)) for k, (name, shape) in enumerate(SHAPES.items())}
    kl_soap, kl_shampoo, unguarded, adamw = ([(name, p)] for name, p in params.items())
    groups: list[dict[str, Any]] = [
        {"params": kl_soap, "rule": "soap", "use_kl_shampoo": True, "precondition_frequency": 2},
        {"params": kl_shampoo, "rule": "shampoo", "use_kl_shampoo": True, "exponent": -0.5, "merge_dims": False},
        {"params": unguarded, "rule": "soap", "noise_floor": 0.0},
        {"params": adamw, "rule": "adamw", "weight_decay": 0.0},
    ]
    return params, steepest.Optimizer(groups, lr=0.05)


def waves(shape: tuple[int, ...], phase: float) -> Tensor:
    """Numbers between -1 and 1 that depend on their index only."""
    count = int(torch.tensor(shape).prod())
    return torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + phase).float().view(shape)


def train(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The gradients of a loss that pulls each weight to a place that moves; experts rest in step 1."""
    for k in steps:
        for i, (name, p) in enumerate(params.items()):
            p.grad = None if (name, k) == ("experts", 1) else p.detach() - waves(SHAPES[name], 0.9 * k + i + 0.5)
        optimizer.step()


def make(file: Path, start: Callable[[], tuple[dict[str, nn.Parameter], steepest.Optimizer]]) -> None:
    """Train, save, train on, and write the state and the weights in the middle and at the end."""
    params, optimizer = start()
    train(params, optimizer, range(BEFORE))
    saved: dict[str, Any] = {"optimizer": optimizer.state_dict()}
    saved["middle"] = {name: p.detach().clone() for name, p in params.items()}
    train(params, optimizer, range(BEFORE, BEFORE + AFTER))
    saved["end"] = {name: p.detach().clone() for name, p in params.items()}
    torch.save(saved, file)


MADE = {"format_1.pt": start, "format_1_kl.pt": start_kl}
"""The files, and the optimizers whose state they hold."""

if __name__ == "__main__":
    make(FOLDER / sys.argv[1], MADE[sys.argv[1]])
