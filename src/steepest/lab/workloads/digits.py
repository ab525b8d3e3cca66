"""Scikit-learn's 1,797 handwritten digits, 8 × 8 pixels: races take seconds, but are too easy to rank optimizers."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from typing_extensions import override

from steepest.lab.workloads.images import data_hash, handwritten
from steepest.lab.workloads.workload import Supervised, scaled


class Digits(Supervised):
    """A perceptron, 64-128-128-128-10, on images ``[1797, 64]`` from -1 to 1 and the digits in them."""

    steps = 200
    measure = "validation loss (nats per image)"
    likelihood = "categorical"
    held_out = 360
    batch_size = 128

    def __init__(self, *, scale: float = 1.0) -> None:
        self.width = scaled(128, scale)
        images, self.targets = handwritten()
        self.inputs = images.flatten(1)

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
            "sha256": data_hash(self.inputs, self.targets),
        }
