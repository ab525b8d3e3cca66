"""One of scikit-learn's photographs as a function from coordinates to colours: small, and badly conditioned."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.workloads.workload import Supervised, needs, scaled, shuffled

SHRUNK = 4
"""Side of the squares of the photograph, 427 × 640, whose mean is one pixel."""
PAPERS_FREQUENCY = 30.0
FREQUENCY = 5.0
"""The factor before each layer inside a sine. The paper's 30 needs learning rates far below those of other networks;
with 5, and weights larger by as much, the network is the same function at first, biases aside, and usual rates suit."""


class Photo(Supervised):
    """A SIREN, 2-64-64-64-3 with sines between, on 106 × 160 pixels (Sitzmann et al., arXiv:2006.09661)."""

    suite_steps = 1000
    measure = "validation loss (mean squared error of a colour)"
    batch_size = 2048
    likelihood = "normal"

    def __init__(self, *, scale: float = 1.0) -> None:
        self.width = scaled(64, scale)
        picture = _photograph()  # [3, h, w]
        rows, columns = (torch.linspace(-1, 1, size) for size in picture.shape[1:])
        coordinates = torch.cartesian_prod(rows, columns)  # [h·w, 2]
        self.inputs, self.targets = shuffled(coordinates, picture.flatten(1).mT)
        self.held_out = len(self.targets) // 10

    @override
    def model(self) -> nn.Module:
        return Siren(self.width)

    @override
    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    @override
    def describe(self) -> dict[str, str]:
        pixels = (self.targets * 1000).round().short()  # the last bits of a mean differ between machines
        return {
            "photograph": "china.jpg of scikit-learn",
            "pixels": f"{len(self.targets) - self.held_out:,} to train on, {self.held_out:,} held out",
            "sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        }


class Siren(nn.Module):
    """A network of sines from coordinates ``[b, 2]`` to colours ``[b, 3]``, initialized as in the paper."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.last = nn.Linear(width, 3)
        bound = math.sqrt(6 / width)
        _uniform(self.first.weight, PAPERS_FREQUENCY / FREQUENCY / 2)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            _uniform(layer.weight, bound / FREQUENCY)
        _uniform(self.last.weight, bound / PAPERS_FREQUENCY)

    def forward(self, coordinates: Tensor) -> Tensor:
        """Return the colours; all sines have the same frequency, which the first layer's weights spread."""
        x = torch.sin(FREQUENCY * self.first(coordinates))
        for layer in self.hidden:
            x = torch.sin(FREQUENCY * layer(x))
        colours: Tensor = self.last(x)
        return colours


def _uniform(weight: Tensor, bound: float) -> None:
    nn.init.uniform_(weight, -bound, bound)


def _photograph() -> Tensor:
    """Return the photograph, shrunk, ``[3, h, w]`` in [-1, 1]."""
    with needs("scikit-learn and pillow"):  # without pillow, scikit-learn can't read JPEG
        from sklearn.datasets import load_sample_image

        photograph = load_sample_image("china.jpg")  # [427, 640, 3], 0..255
    picture = torch.tensor(photograph).permute(2, 0, 1).float() / 127.5 - 1
    return F.avg_pool2d(picture, SHRUNK)
