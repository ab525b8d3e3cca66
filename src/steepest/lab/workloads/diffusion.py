"""Denoising diffusion of handwritten digits: a small U-Net learns which noise was added to an image.

    x_t = cos(πt/2) x + sin(πt/2) ε        ε normal, t uniform in [0, 1]
    loss = mean (ε̂(x_t, t) - ε)²

Ho et al., arXiv:2006.11239; the cosine in its simplest form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.workloads.images import data_hash, handwritten
from steepest.lab.workloads.workload import Workload, scaled

Noisy = tuple[Tensor, Tensor, Tensor]
"""Noisy images ``[b, 1, 8, 8]``, their times ``[b]``, and the noise ``[b, 1, 8, 8]``."""
FREQUENCIES = 8


class Diffusion(Workload):
    """1,437 digits to train on; the measure is the loss on 360 others, with fixed noise at times spread evenly."""

    suite_steps = 400
    measure = "validation loss (mean squared error of the noise)"
    likelihood = "normal"
    held_out = 360
    batch_size = 64

    def __init__(self, *, scale: float = 1.0) -> None:
        self.width = scaled(16, scale)
        images, _ = handwritten()
        self.images = images[:, None]  # [1797, 1, 8, 8] from -1 to 1
        times = torch.linspace(0.01, 0.99, self.held_out)  # the images' order is random
        self.fixed = noisy(self.images[: self.held_out], times, torch.Generator().manual_seed(0))

    @override
    def model(self) -> nn.Module:
        return UNet(self.width)

    @override
    def batch(self, generator: torch.Generator) -> Noisy:
        chosen = torch.randint(self.held_out, len(self.images), (self.batch_size,), generator=generator)
        return noisy(self.images[chosen], torch.rand(self.batch_size, generator=generator), generator)

    @override
    def loss(self, model: nn.Module, batch: Noisy) -> Tensor:
        images, times, noise = batch
        return F.mse_loss(model(images, times), noise)

    @override
    def validation(self, model: nn.Module) -> float:
        return self.loss(model, self.fixed).item()

    @override
    def describe(self) -> dict[str, str]:
        train = len(self.images) - self.held_out
        return {
            "images": f"scikit-learn's digits: {train:,} to train on, {self.held_out} held out",
            "sha256": data_hash(self.images),
        }


def noisy(images: Tensor, times: Tensor, generator: torch.Generator) -> Noisy:
    """Return images with as much noise as at these times, the times, and the noise."""
    noise = torch.randn(images.shape, generator=generator)
    angles = (times * math.pi / 2)[:, None, None, None]
    return angles.cos() * images + angles.sin() * noise, times, noise


class UNet(nn.Module):
    """Two resolutions, 8 × 8 and 4 × 4; the time moves the channels of both after their first convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(2 * FREQUENCIES, 3 * width)
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """Return the noise ``[b, 1, 8, 8]`` in noisy images ``[b, 1, 8, 8]`` of these times ``[b]``."""
        octaves = 2.0 ** torch.arange(FREQUENCIES, device=times.device)
        phases = math.pi * times[:, None] * octaves  # [b, f]
        shifts = self.time(torch.cat([phases.sin(), phases.cos()], dim=1))[:, :, None, None]
        width = self.enter.out_channels
        fine = F.silu(self.enter(images) + shifts[:, :width])
        coarse = F.silu(self.down(fine) + shifts[:, width:])
        coarse = F.silu(coarse + self.middle(coarse))
        x = F.silu(self.up(F.interpolate(coarse, scale_factor=2.0)))
        x = F.silu(self.join(torch.cat([fine, x], dim=1)))
        noise: Tensor = self.leave(x)
        return noise
