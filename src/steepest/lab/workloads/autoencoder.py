"""A deep autoencoder of scikit-learn's 1,797 handwritten digits, 8 × 8 pixels: a test of second-order methods.

Hinton and Salakhutdinov (Science 313, 2006) trained such networks layer by layer, because gradients alone did not get
far; Martens (ICML 2010) and K-FAC (arXiv:1503.05671) made them the test of optimizers that use curvature.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.workloads.images import data_hash, handwritten
from steepest.lab.workloads.workload import Supervised, scaled


class Autoencoder(Supervised):
    """Widths 64-128-64-32-10-32-64-128-64 with tanh between; the code of an image is 10 numbers.

    The loss is the logistic one, summed over pixels. Even a perfect copy has a loss, the entropy of grey pixels, so the
    measure is the excess over it. It is one of optimization: it is taken on the images that are trained on, because
    1,617 images are overfitted, and lower losses come with larger errors on the others (`held_out_error`).
    """

    steps = 400
    suite_steps = 1000
    measure = "excess loss on the training images (nats per image)"
    likelihood = "bernoulli"
    held_out = 180
    batch_size = 512

    def __init__(self, *, scale: float = 1.0) -> None:
        encoder = tuple(scaled(width, scale) for width in (128, 64, 32))
        self.widths = (64, *encoder, 10, *reversed(encoder), 64)
        images, _ = handwritten()
        grey = (images.flatten(1) + 1) / 2
        self.inputs = self.targets = grey.roll(self.held_out, dims=0)  # [1797, 64] from 0 to 1; the last ones first
        self.entropy = _entropy(self.inputs[self.held_out :].double())

    @override
    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise(self.widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers[:-1])  # logits of pixels [b, 64]

    @override
    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)

    @override
    def validation(self, model: nn.Module) -> float:
        images = self.inputs[self.held_out :]
        return float(self.criterion(model(images), images)) - self.entropy

    def held_out_error(self, model: nn.Module) -> float:
        """Return the squared error of images that were not trained on, summed over pixels; their mean."""
        images = self.inputs[: self.held_out]
        return float((model(images).sigmoid() - images).square().sum(dim=1).mean())

    @override
    def describe(self) -> dict[str, str]:
        return {
            "images": f"scikit-learn's digits: {len(self.inputs) - self.held_out:,} to train on, {self.held_out} held "
            "out, which the measure does not look at",
            "sha256": data_hash(self.inputs),
            "entropy": f"{self.entropy:.3f} nats per image, which the excess is counted from",
        }


def _entropy(shares: Tensor) -> float:
    """Return the entropy in nats of independent pixels that are on with these probabilities, summed; their mean."""
    entropy = torch.special.xlogy(shares, shares) + torch.special.xlogy(1 - shares, 1 - shares)  # [n, 64]
    return -float(entropy.sum(dim=1).mean())
