"""Random numbers that depend on a step and a name only, so that runs can be compared bit for bit."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor


def drawn(k: int, name: str, shape: Iterable[int]) -> Tensor:
    """Return normal random numbers in float32 on the CPU, the same for the same arguments."""
    number = zlib.crc32(f"{name}, {k}".encode())
    generator = torch.Generator().manual_seed(number)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def gradient(k: int, name: str, p: Tensor) -> Tensor:
    """Return the gradient of step ``k`` for the parameter of this name."""
    return drawn(1 + k, name, p.shape).to(p.device, p.dtype)


def seed(k: int) -> None:
    """Seed the global generators; `torch.manual_seed` would take longer than a step."""
    torch.default_generator.manual_seed(k)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(k)
