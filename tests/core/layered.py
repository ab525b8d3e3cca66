"""A small network, its batches and its training by K-FAC, for the tests of K-FAC."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import steepest

KINDS = (steepest.KFAC, steepest.EKFAC)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int, rows: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator).to(dtype), torch.randn(rows, 3, generator=generator).to(dtype)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over rows."""
    return (outputs - targets).square().sum(-1).mean()


def train(model: nn.Module, opt: torch.optim.Optimizer, batches: range, scale: float = 1.0) -> None:
    for number in batches:
        x, y = batch(number)
        opt.zero_grad()
        outputs = model(x)
        opt.sample(outputs, "normal")
        (scale * squares(outputs, y)).backward()
        opt.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def factors(opt: torch.optim.Optimizer) -> list[Tensor]:
    """What statistics change: copies of A and B, and the count of how many came in."""
    return [s[name].clone() for s in opt.state.values() for name in ("A", "B", "statistics") if name in s]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def close(x: Tensor, y: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
