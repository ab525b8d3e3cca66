"""Scikit-learn's 1,797 handwritten digits, 8 × 8 pixels, as they are and corrupted afresh each time."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.workloads.workload import Pairs, Supervised, needs, shuffled

NOISE = 0.5
"""Deviation of the noise on pixels, which are from -1 to 1."""
COPIES = 2
"""Corrupted copies of each held-out image."""


def handwritten() -> Pairs:
    """Return the images ``[1797, 8, 8]``, from -1 to 1, and their digits ``[1797]``, in a fixed random order."""
    with needs("scikit-learn"):
        from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 8, 8) / 8 - 1
    return shuffled(images, torch.from_numpy(labels).long())


class Corrupted(Supervised):
    """Which digit is it, shifted by up to a pixel each way and under noise?

    Clean digits are learned by heart, to a loss of 0, and then the held-out loss says how sure the network is of its
    mistakes. Each batch is corrupted afresh, so nothing can be learned by heart, and the lower held-out loss, that of
    360 other images with two fixed corruptions each, is the better network.
    """

    measure = "validation loss (nats per image)"
    likelihood = "categorical"
    held_out = 360
    batch_size = 128

    def __init__(self) -> None:
        self.inputs, self.targets = handwritten()
        copies = self.inputs[: self.held_out].repeat(COPIES, 1, 1)
        self.fixed = (corrupt(copies, torch.Generator().manual_seed(0)), self.targets[: self.held_out].repeat(COPIES))

    @override
    def batch(self, generator: torch.Generator) -> Pairs:
        images, labels = super().batch(generator)
        return corrupt(images, generator), labels

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, self.fixed).item()

    @override
    def describe(self) -> dict[str, str]:
        train = len(self.targets) - self.held_out
        return {
            "images": f"scikit-learn's digits, shifted and with noise: {train:,} to train on, {self.held_out} held out",
            "sha256": data_hash(self.inputs, self.targets),
        }


def corrupt(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``[b, 8, 8]``, each shifted by -1, 0 or 1 pixel along both sides, and with Gaussian noise."""
    count, size, _ = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)  # [b, 10, 10]
    rows, columns = torch.randint(3, (2, count, 1), generator=generator) + torch.arange(size)  # [b, 8] each
    shifted = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted + NOISE * torch.randn(shifted.shape, generator=generator)


def data_hash(*tensors: Tensor) -> str:
    """Return the SHA-256 of the bytes of all tensors."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
