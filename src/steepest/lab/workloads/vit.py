"""A tiny vision transformer on corrupted handwritten digits, cut into patches of 2 × 2 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from steepest.lab.workloads.gpt import Block
from steepest.lab.workloads.images import Corrupted
from steepest.lab.workloads.workload import scaled

PATCH = 2
HEADS = 4


class VisionTransformer(Corrupted):
    """Two blocks of width 32, four heads, 16 patches; what is measured, and why: `steepest.lab.workloads.images`."""

    suite_steps = 600
    batch_size = 32

    def __init__(self, *, scale: float = 1.0) -> None:
        self.width = scaled(32, scale, multiple=HEADS)
        super().__init__()

    @override
    def model(self) -> nn.Module:
        return ViT(self.width)


class ViT(nn.Module):
    """A transformer from images ``[b, 8, 8]`` to logits ``[b, 10]``, of the mean over patches."""

    def __init__(self, width: int, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.5 * torch.randn(16, width))  # as large as patches, so that places count at once
        self.blocks = nn.Sequential(*(Block(width, HEADS, causal=False) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each image's digit."""
        pixels = F.unfold(images[:, None], PATCH, stride=PATCH).mT  # [b, 16, 4]
        x = self.blocks(self.patches(pixels) + self.position)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits
