"""A small network and its residuals, for several files."""

from itertools import pairwise

import torch
from torch import nn

from steepest import Residual


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(count=12, seed=0):
    """Residuals of a network with two inputs and one output."""
    x = random(count, 2, seed=seed)
    return Residual(lambda u, x, y: u(x) - y, x, x.sin().sum(1))


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def step_closure(residual, model):
    """The same residuals as a closure returns them."""
    return lambda: residual.factor * residual.values(model).reshape(-1)
