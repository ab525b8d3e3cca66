"""Inputs that every reference case shares: deterministic matrices, and the authors' outputs for them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def matrix(m: int, n: int, t: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """X[i, j] = sin(1.3 i + 0.7 i j + 2.1 t) + 0.5 cos(0.9 j (t + 1)), i and j from 1: the gradient at step t."""
    i = torch.arange(1, m + 1, dtype=torch.float64).unsqueeze(1)
    j = torch.arange(1, n + 1, dtype=torch.float64).unsqueeze(0)
    return (torch.sin(1.3 * i + 0.7 * i * j + 2.1 * t) + 0.5 * torch.cos(0.9 * j * (t + 1))).to(dtype)


@pytest.fixture(name="matrix")
def matrix_function():
    return matrix


@pytest.fixture
def start():
    """Where weights start: 0.1 · X(m, n, -1)."""
    return lambda m, n, dtype=torch.float64: 0.1 * matrix(m, n, -1, dtype)


@pytest.fixture
def golden():
    """Read a golden file: ``golden("moso")``."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture
def trajectory(start):
    """Weights after each step, gradients being ``matrix(m, n, step)``, and the optimizer's state at the end."""

    def run(make, m: int, n: int, steps: int, dtype: torch.dtype = torch.float32):
        W = torch.nn.Parameter(start(m, n, dtype))
        optimizer = make([W])
        weights = []
        for step in range(1, steps + 1):
            W.grad = matrix(m, n, step, dtype)
            optimizer.step()
            weights.append(W.detach().clone())
        return weights, optimizer.state[W]

    return run
