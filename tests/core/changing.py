"""Some parameters, their training, and what is compared, for the tests of what others write to state and groups."""

import copy

import fed
import torch

from steepest.rules import RULES

SHAPES = [(6, 4), (6, 4), (4, 6), (5,), (3, 2, 2)]
MATRIX_RULES = [name for name in RULES if name not in ("adamw", "lion")]


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(s, generator=seeded(i)).to(dtype)) for i, s in enumerate(shapes)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def optimizer(params, rule, **options):
    return fed.optimizer(params, rule, **{"lr": 0.05, "weight_decay": 0.1} | options)


def train(opt, params, steps, seed=0):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=seeded(100 * seed + 10 * step + i)).to(p.dtype)
        opt.step()


def of(params):
    return [p.detach().clone() for p in params]


def everything(opt, params):
    """Weights, the state of each parameter, and the options, as copies."""
    return copy.deepcopy(([p.detach() for p in params], [dict(opt.state[p]) for p in params], opt.param_groups))


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def assert_same(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
