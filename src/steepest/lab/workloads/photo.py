"""One of scikit-learn's photographs, as a function from coordinates to colours: small, and badly conditioned."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.fingerprints import digest
from steepest.lab.workloads.workload import Workload

SHRUNK = 4
"""Each pixel is the mean of so many by so many of the photograph's 427 × 640."""
BATCH = 2048
HELD_OUT = 10
"""One pixel in so many is never trained on."""
PAPERS_FREQUENCY = 30.0
FREQUENCY = 5.0
"""The factor before each layer inside a sine. The paper's 30 asks for learning rates far below those of other networks;
with 5, and weights that much larger, the network begins as the same function, biases aside, and usual rates suit it."""

Pixels = tuple[Tensor, Tensor]
"""Coordinates ``[b, 2]`` and colours ``[b, 3]``, all in [-1, 1]."""


class Photo(Workload):
    """A SIREN, 2-64-64-64-3 with sines between, on 106 × 160 pixels (Sitzmann et al., arXiv:2006.09661)."""

    measure = "validation loss (mean squared error of a colour)"

    def __init__(self) -> None:
        picture = _photograph()  # [3, h, w]
        height, width = picture.shape[1:]
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        places = torch.cartesian_prod(rows, columns)  # [h·w, 2]
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
        self.places = places[order]
        self.colours = picture.flatten(1).mT[order]  # [h·w, 3]
        self.held_out = len(order) // HELD_OUT

    @override
    def model(self) -> nn.Module:
        return Siren()

    @override
    def batch(self, generator: torch.Generator) -> Pixels:
        chosen = torch.randint(self.held_out, len(self.places), (BATCH,), generator=generator)
        return self.places[chosen], self.colours[chosen]

    @override
    def loss(self, model: nn.Module, batch: Pixels) -> Tensor:
        places, colours = batch
        return F.mse_loss(model(places), colours)

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, (self.places[: self.held_out], self.colours[: self.held_out])).item()

    @override
    def fingerprint(self) -> str:
        return digest([super().fingerprint(), self.describe()])

    @override
    def describe(self) -> dict[str, str]:
        pixels = (self.colours * 1000).round().short()  # the last bits of a mean differ between machines
        return {
            "photograph": "china.jpg of scikit-learn",
            "pixels": f"{len(self.places) - self.held_out:,} to train on, {self.held_out:,} held out",
            "sha256": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        }


class Siren(nn.Module):
    """Coordinates ``[b, 2]`` to colours ``[b, 3]``, through sines; initialized as the paper says."""

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

    def forward(self, places: Tensor) -> Tensor:
        """All sines have the same frequency; the first layer's weights spread it."""
        x = torch.sin(FREQUENCY * self.first(places))
        for layer in self.hidden:
            x = torch.sin(FREQUENCY * layer(x))
        colours: Tensor = self.last(x)
        return colours


def _uniform(weight: Tensor, bound: float) -> None:
    nn.init.uniform_(weight, -bound, bound)


def _photograph() -> Tensor:
    """The photograph, shrunk, ``[3, h, w]`` in [-1, 1]."""
    try:
        from sklearn.datasets import load_sample_image

        photograph = load_sample_image("china.jpg")  # [427, 640, 3], 0..255
    except ImportError as error:  # scikit-learn, or pillow, without which it can't read JPEG
        raise BadInput('workload photo needs scikit-learn and pillow: pip install "steepest[lab]"') from error
    picture = torch.tensor(photograph).permute(2, 0, 1).float() / 127.5 - 1
    return F.avg_pool2d(picture, SHRUNK)
