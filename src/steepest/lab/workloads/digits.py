"""scikit-learn's 1,797 handwritten digits, 8 × 8 pixels: seconds, for smoke tests; too easy to rank optimizers by."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.workloads.workload import Workload

Labelled = tuple[Tensor, Tensor]
"""Images ``[b, ...]`` and what they show ``[b]``."""


class Classification(Workload):
    """Images and their labels, in a fixed order; the first ones are held out."""

    steps = 200
    measure = "validation loss (nats per image)"
    held_out = 360
    batch_size = 128
    images: Tensor
    labels: Tensor

    @override
    def batch(self, generator: torch.Generator) -> Labelled:
        chosen = torch.randint(self.held_out, len(self.labels), (self.batch_size,), generator=generator)
        return self.images[chosen], self.labels[chosen]

    @override
    def loss(self, model: nn.Module, batch: Labelled) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, (self.images[: self.held_out], self.labels[: self.held_out])).item()


class Digits(Classification):
    """A perceptron, 64-128-128-128-10."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.images = (torch.from_numpy(pixels).float() / 8 - 1)[order]  # 0..16 to -1..1
        self.labels = torch.from_numpy(labels).long()[order]

    @override
    def model(self) -> nn.Module:
        widths = (64, 128, 128, 128)
        hidden = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        return nn.Sequential(*hidden, nn.Linear(128, 10))


class DigitsViT(Digits):
    """A vision transformer: 16 patches of 2 × 2 pixels, two encoder layers of width 64."""

    @override
    def model(self) -> nn.Module:
        return ViT()


class ViT(nn.Module):
    """Images ``[b, 64]`` to logits ``[b, 10]``."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.patches = nn.Linear(4, d)
        self.position = nn.Parameter(torch.randn(16, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The mean over patches decides."""
        squares = images.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # [b, 16, 4]
        logits: Tensor = self.head(self.encoder(self.patches(squares) + self.position).mean(dim=1))
        return logits
