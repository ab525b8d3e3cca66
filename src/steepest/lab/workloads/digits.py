"""Scikit-learn's 1,797 handwritten digits, 8 × 8 pixels: races take seconds, but are too easy to rank optimizers."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch
from torch import nn
from typing_extensions import override

from steepest.lab.workloads.workload import Supervised, needs, scaled, shuffled


class Digits(Supervised):
    """A perceptron, 64-128-128-128-10, on images ``[1797, 64]`` from -1 to 1 and the digits in them."""

    steps = 200
    measure = "validation loss (nats per image)"
    likelihood = "categorical"
    held_out = 360
    batch_size = 128

    def __init__(self, *, scale: float = 1.0) -> None:
        self.width = scaled(128, scale)
        with needs("scikit-learn"):
            from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self.inputs, self.targets = shuffled(torch.from_numpy(pixels).float() / 8 - 1, torch.from_numpy(labels).long())

    @override
    def model(self) -> nn.Module:
        widths = (64, self.width, self.width, self.width)
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        return nn.Sequential(*hidden, nn.Linear(self.width, 10))

    @override
    def describe(self) -> dict[str, str]:
        train = len(self.targets) - self.held_out
        return {
            "images": f"scikit-learn's digits: {train:,} to train on, {self.held_out:,} held out",
            "sha256": hashlib.sha256(self.inputs.numpy().tobytes() + self.targets.numpy().tobytes()).hexdigest(),
        }
