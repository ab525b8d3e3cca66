"""A perceptron on corrupted handwritten digits: the plainest network, on a task that it can't learn by heart."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from typing_extensions import override

from steepest.lab.workloads.images import Corrupted
from steepest.lab.workloads.workload import scaled


class Perceptron(Corrupted):
    """Widths 64-128-128-128-10 with ReLU between; what is measured, and why: `steepest.lab.workloads.images`."""

    steps = 400
    suite_steps = 1200
    batch_size = 256

    def __init__(self, *, scale: float = 1.0) -> None:
        self.width = scaled(128, scale)
        super().__init__()

    @override
    def model(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise((64, self.width, self.width, self.width)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(self.width, 10))
