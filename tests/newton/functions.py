"""Functions to minimize, and how tests of L-BFGS do that."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
EXACT: dict[str, Any] = {"tolerance_grad": 0, "tolerance_change": 0, "max_eval": 10_000}


def quadratic(n: int, condition: float) -> Function:
    g = torch.Generator().manual_seed(n)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    A = Q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ Q.T
    b = torch.randn(n, generator=g, dtype=torch.float64)
    return lambda x: x @ A @ x / 2 - b @ x


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def closure_of(optimizer: torch.optim.Optimizer, x: Tensor, f: Function) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        return loss

    return closure


def torchs(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params, line_search_fn="strong_wolfe", **options)


def iterates(make: Any, f: Function, start: Tensor, steps: int, **options: Any) -> Tensor:
    """Return the weights after each step, ``[steps, P]``."""
    x = nn.Parameter(start.clone())
    optimizer = make([x], **options)
    found = []
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, x, f))
        found.append(x.detach().clone())
    return torch.stack(found)


F64 = torch.float64
PROBLEMS: dict[str, tuple[Function, Tensor, int]] = {
    "quadratic 20": (quadratic(20, 1e3), torch.zeros(20, dtype=F64), 40),
    "quadratic 50": (quadratic(50, 1e4), torch.ones(50, dtype=F64), 30),
    "rosenbrock 2": (rosenbrock, torch.tensor([-1.2, 1.0], dtype=F64), 20),
    "rosenbrock 10": (rosenbrock, torch.full((10,), -1.0, dtype=F64), 25),
}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
