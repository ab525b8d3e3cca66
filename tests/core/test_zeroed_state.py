"""State that is zeroed in place starts afresh."""

from typing import Any

import fed
import pytest
import torch

from steepest.engine.optimizer import Optimizer
from steepest.rules import RULES

CASES: list[tuple[str, dict[str, Any]]] = [(rule, {}) for rule in RULES] + [
    (rule, options)
    for rule in ("soap", "kl_soap")
    for options in (
        {"solver": "qr"},
        {"solver": "first_order"},
        {"basis_timing": "after"},
        {"adam_warmup_steps": 3},
        {"refresh_async": True},
        {"use_adaptive_criteria": True},
        {"basis_dtype": "bfloat16", "moment_dtype": "int8"},
    )
]
CASES += [(rule, {"moment_dtype": "int8"}) for rule in ("dion", "lion", "adamw")]


def gradient(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeroed(rule: str, options: dict[str, Any], shape: tuple[int, ...], clocks: bool) -> tuple[torch.Tensor, Optimizer]:
    """A weight whose optimizer had its state zeroed after six steps."""
    W = torch.nn.Parameter(torch.ones(shape))
    opt = fed.optimizer([W], rule, lr=0.01, **options)
    for seed in range(6):
        W.grad = gradient(shape, seed)
        opt.step()
    for name, x in opt.state[W].items():
        if clocks or name not in ("step", "clock"):
            x.zero_()
    return W, opt


@pytest.mark.parametrize(("rule", "options"), CASES)
@pytest.mark.parametrize("shape", [(6, 4), (3, 20)])
def test_with_its_clocks_it_is_that_of_a_new_optimizer(rule, options, shape):
    W, opt = zeroed(rule, options, shape, clocks=True)
    V = torch.nn.Parameter(W.detach().clone())
    fresh = fed.optimizer([V], rule, lr=0.01, **options)
    for seed in range(6, 14):
        V.grad, W.grad = gradient(shape, seed), gradient(shape, seed)
        opt.step()
        fresh.step()
        assert torch.equal(W, V)


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_without_its_clocks_it_stays_finite(rule, options):
    W, opt = zeroed(rule, options, (6, 4), clocks=False)
    for seed in range(6, 20):
        W.grad = gradient((6, 4), seed)
        opt.step()
    assert W.isfinite().all()
    assert all(x.isfinite().all() for x in opt.state[W].values())
