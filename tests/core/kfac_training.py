"""A small network and its training, for the tests of K-FAC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    for k, p in enumerate(model.parameters()):
        p.data = 0.5 * draw(*p.shape, seed=k, dtype=dtype)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int], shape: Any = (8, 4)) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        y = model(draw(*shape, seed=step, dtype=dtype))
        mse_loss(y, draw(*y.shape, seed=99 + step, dtype=dtype)).backward()
        optimizer.step()


def of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and state, as copies."""
    state = [x for p in model.parameters() for _, x in sorted(optimizer.state[p].items())]
    return [x.clone() for x in (*of(model), *state)]


def same(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
