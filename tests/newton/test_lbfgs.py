"""L-BFGS against torch's with the same line search, and its direction against the two-loop recursion."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from functions import EXACT, F64, PROBLEMS, closure_of, iterates, torchs
from torch import Tensor, nn

import steepest
from steepest.newton import pairs

# Against torch's.


@pytest.mark.parametrize("history", [3, 10, 100])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_iterates_are_torchs(problem: str, history: int) -> None:
    """Later iterates of Rosenbrock's function differ, because each doubles the difference that rounding has made."""
    f, start, steps = PROBLEMS[problem]
    options = EXACT | {"max_iter": 1, "history_size": history}
    ours, theirs = (iterates(make, f, start, steps, **options) for make in (steepest.LBFGS, torchs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert f(ours[-1]) < f(start)


@pytest.mark.parametrize("lr", [0.3, 1.0])
def test_steps_of_many_iterations_and_other_rates_are_torchs(lr: float) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    ours, theirs = (
        iterates(make, f, start, 3, lr=lr, max_iter=7, max_eval=10_000) for make in (steepest.LBFGS, torchs)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("max_iter", [1, 5])
def test_without_line_search_steps_are_torchs(max_iter: int) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    options = {"lr": 0.5, "max_iter": max_iter, "max_eval": 100}
    ours = iterates(steepest.LBFGS, f, start, 8, line_search=None, **options)
    theirs = iterates(torch.optim.LBFGS, f, start, 8, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_float32_is_float64_up_to_rounding() -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    exact = iterates(steepest.LBFGS, f, start, 8, max_iter=1)
    rounded = iterates(steepest.LBFGS, f, start.float(), 8, max_iter=1)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=1e-4)
    assert f(iterates(steepest.LBFGS, f, start.float(), 3)[-1]) < 1e-8


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9, 1e-12])
def test_the_scale_of_a_loss_does_not_matter(scale: float) -> None:
    """torch's drops pairs whose sᵀy is below 1e-10, which all are where losses are small."""
    curvatures = torch.logspace(0, 3, 20, dtype=F64)

    def reached(make: Any) -> float:
        x = nn.Parameter(torch.ones(20, dtype=F64))
        optimizer = make([x], **EXACT | {"max_iter": 60})
        optimizer.step(closure_of(optimizer, x, lambda x: scale * (curvatures * x * x).sum()))
        return float((curvatures * x * x).sum().detach())

    assert reached(steepest.LBFGS) < 1e-20
    if scale < 1:
        assert reached(torchs) > 1e-8


# The direction.


def two_loops(S: list[Tensor], Y: list[Tensor], g: Tensor) -> Tensor:
    """Nocedal and Wright, Algorithm 7.4."""
    q, alphas = g.clone(), []
    for s, y in zip(reversed(S), reversed(Y), strict=True):
        alphas.append(s @ q / (y @ s))
        q -= alphas[-1] * y
    r = q * (S[-1] @ Y[-1] / (Y[-1] @ Y[-1]))
    for s, y, alpha in zip(S, Y, reversed(alphas), strict=True):
        r += s * (alpha - y @ r / (y @ s))
    return -r


def nothing_remembered(size: int, length: int) -> dict[str, torch.Tensor]:
    x = nn.Parameter(torch.zeros(length, dtype=F64))
    return steepest.LBFGS([x], history_size=size).state[x]


@pytest.mark.parametrize("count", [1, 3, 5, 6, 12])
def test_the_direction_is_that_of_the_two_loops(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    M = torch.randn(9, 9, generator=g, dtype=F64)
    state = nothing_remembered(5, 9)
    S, Y = [], []
    for _ in range(count):
        S.append(torch.randn(9, generator=g, dtype=F64))
        Y.append(M @ M.T @ S[-1] + S[-1])
        pairs.remember(state, S[-1], Y[-1])
        assert torch.equal(pairs.direction(state, Y[-1]), pairs.direction(copy.deepcopy(state), Y[-1]))
    v = torch.randn(9, generator=g, dtype=F64)
    torch.testing.assert_close(pairs.direction(state, v), two_loops(S[-5:], Y[-5:], v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pairs.direction(state, Y[-1]), -S[-1], rtol=1e-9, atol=1e-9)  # the secant equation


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_pairs_need_positive_curvature_at_any_scale(scale: float) -> None:
    state = nothing_remembered(4, 2)
    s = torch.tensor([1.0, 0.0], dtype=F64)
    for y, count in (([-1.0, 0.0], 0), ([0.5e-10, 1.0], 0), ([2e-10, 1.0], 1), ([math.nan, 1.0], 1), ([1.0, 5.0], 2)):
        pairs.remember(state, s, scale * torch.tensor(y, dtype=F64))
        assert state["pairs"] == count
    pairs.forget(state)
    assert torch.equal(pairs.direction(state, s), -s)
