"""Scikit-learn's 1,797 handwritten digits, 8 × 8 pixels: races take seconds, but are too easy to rank optimizers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from steepest.lab.workloads.workload import Supervised, needs, shuffled


class Digits(Supervised):
    """Images ``[1797, 64]`` from -1 to 1, and the digits in them."""

    steps = 200
    measure = "validation loss (nats per image)"
    held_out = 360
    batch_size = 128

    def __init__(self) -> None:
        with needs("scikit-learn"):
            from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self.inputs, self.targets = shuffled(torch.from_numpy(pixels).float() / 8 - 1, torch.from_numpy(labels).long())


class DigitsMLP(Digits):
    """A perceptron, 64-128-128-128-10."""

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
    """A transformer from images ``[b, 64]`` to logits ``[b, 10]``."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.patches = nn.Linear(4, d)
        self.position = nn.Parameter(torch.randn(16, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(d, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the mean over patches."""
        squares = images.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # [b, 16, 4]
        logits: Tensor = self.head(self.encoder(self.patches(squares) + self.position).mean(dim=1))
        return logits
