"""L-BFGS where steps fail: cut off, without a finite loss, without a gradient, with errors in the closure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from functions import EXACT, F64, PROBLEMS, Function, closure_of, iterates, same
from torch import Tensor, nn

import steepest


def bounded(max_eval: int, f: Function, start: Tensor, **options: Any) -> tuple[list[int], Tensor]:
    """Return the calls of the closure in each of five steps, and the weights."""
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x], max_eval=max_eval, **options)
    calls = []
    for _ in range(5):
        before = optimizer.evaluations
        optimizer.step(closure_of(optimizer, x, f))
        calls.append(optimizer.evaluations - before)
    return calls, x.detach()


@pytest.mark.parametrize("max_eval", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_max_eval_holds_in_the_line_search_too(max_eval: int, line_search: str | None) -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    calls, x = bounded(max_eval, f, start, line_search=line_search, lr=1.0 if line_search else 1e-2)
    assert max(calls) <= max_eval
    if max_eval > 2:
        assert f(x) < f(start)


def test_a_search_that_is_cut_off_keeps_the_pairs() -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x], max_iter=30)
    counts = []
    for max_eval in range(3, 14):
        optimizer.param_groups[0]["max_eval"] = max_eval
        optimizer.step(closure_of(optimizer, x, f))
        counts.append(int(optimizer.state[x]["pairs"]))
    assert counts == sorted(counts)
    assert counts[-1] > 20


@pytest.mark.parametrize("log", [torch.log, lambda x: torch.log(x.clamp(min=0))], ids=["nan", "inf"])
def test_regions_without_a_finite_loss_are_too_far(log: Function) -> None:
    x = nn.Parameter(torch.tensor([5.0, 0.1], dtype=F64))
    optimizer = steepest.LBFGS([x], lr=100.0, max_eval=100)
    barrier = closure_of(optimizer, x, lambda x: (x - log(x)).sum())
    for _ in range(5):
        optimizer.step(barrier)
        assert bool((x > 0).all())
    torch.testing.assert_close(x.detach(), torch.ones(2, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [(-5.0, math.nan), (-math.inf, -1.0), (-5.0, -math.inf)])
def test_a_low_loss_with_numbers_that_are_not_finite_is_too_far(bad: tuple[float, float]) -> None:
    x = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = steepest.LBFGS([x], lr=3.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x - 0.8).square().sum()
        loss.backward()
        if x > 1:
            x.grad.fill_(bad[1])
            return torch.tensor(bad[0])
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(x.detach(), torch.full((1,), 0.8, dtype=F64))


def test_a_failed_search_leaves_the_weights_and_begins_anew() -> None:
    f, start, _ = PROBLEMS["rosenbrock 10"]
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x], max_iter=5)
    optimizer.step(closure_of(optimizer, x, f))
    assert optimizer.state[x]["pairs"] == 5
    before = x.detach().clone()

    def kink(x: Tensor) -> Tensor:  # a loss that rises in every direction, with a gradient that points nowhere
        return f(before) + (x - before).abs().sum() * 1e6 + (x - x.detach()).sum()

    optimizer.step(closure_of(optimizer, x, kink))
    assert torch.equal(x, before)
    assert optimizer.state[x]["pairs"] == 0
    optimizer.step(closure_of(optimizer, x, f))
    assert f(x) < f(before)


def test_without_line_search_a_loss_that_is_not_finite_is_undone() -> None:
    x = nn.Parameter(torch.tensor([3.0], dtype=F64))
    optimizer = steepest.LBFGS([x], lr=10.0, line_search=None)
    optimizer.step(closure_of(optimizer, x, lambda x: x.sum() - torch.log(x).sum()))
    assert optimizer.evaluations == 2
    assert torch.equal(x, torch.tensor([3.0], dtype=F64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_step_that_starts_at_a_bad_point_does_nothing(bad: float) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    straight, x = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, other = (steepest.LBFGS([p], max_iter=3) for p in (straight, x))
    for k in range(4):
        if k in (0, 2):
            returned = other.step(closure_of(other, x, lambda x: f(x) + (x * bad).sum()))
            assert returned.requires_grad
        one.step(closure_of(one, straight, f))
        other.step(closure_of(other, x, f))
    assert other.skipped == 2
    assert torch.equal(straight, x)
    same(one.state[straight], other.state[x])


def test_a_zero_gradient_stops_a_step() -> None:
    x = nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = steepest.LBFGS([x], **EXACT)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, x, lambda x: x.square().sum()))
    assert torch.equal(x, torch.zeros(3, dtype=F64))
    assert optimizer.evaluations == 2


def test_parameters_without_a_gradient_stay() -> None:
    a, b = (nn.Parameter(torch.full((2,), value, dtype=F64)) for value in (2.0, 3.0))
    frozen = nn.Parameter(torch.ones(3, dtype=F64), requires_grad=False)
    optimizer = steepest.LBFGS([{"params": []}, {"params": [a, frozen]}, {"params": [b]}], max_iter=3)

    def closure(both: bool) -> Tensor:
        optimizer.zero_grad()
        loss = ((a - 1).square() * (1 + a.square())).sum() + (((a + b) ** 4).sum() if both else 0.0)
        loss.backward()
        return loss

    optimizer.step(lambda: closure(both=True))
    assert not torch.equal(b, torch.full((2,), 3.0, dtype=F64))
    before, moving = b.detach().clone(), a.detach().clone()
    optimizer.step(lambda: closure(both=False))
    assert torch.equal(b, before)
    assert not torch.equal(a, moving)
    assert torch.equal(frozen, torch.ones(3, dtype=F64))


def test_nothing_to_train_is_no_error() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = steepest.LBFGS([{"params": [frozen]}, {"params": [nn.Parameter(torch.zeros(0, 3))]}])
    assert optimizer.step(lambda: torch.tensor(3.0)) == 3
    assert steepest.LBFGS([frozen]).step(lambda: 5.0) == 5


def test_an_error_in_the_closure_restores_the_weights() -> None:
    f, start, _ = PROBLEMS["rosenbrock 2"]
    x = nn.Parameter(start.clone())
    optimizer = steepest.LBFGS([x])
    inner = closure_of(optimizer, x, f)

    def closure() -> Tensor:
        if optimizer.evaluations == 9:
            raise KeyboardInterrupt
        return inner()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(x, start)


def test_closures_are_required_and_return_the_loss() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = steepest.LBFGS([x])
    with pytest.raises(TypeError, match=r"LBFGS.step\(None\): the closure must be a function"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure returned None"):
        optimizer.step(lambda: x.sum().backward())
    with torch.no_grad():
        assert float(optimizer.step(closure_of(optimizer, x, lambda x: x.square().sum()))) == 2


@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(c: float) -> None:
    f, start, _ = PROBLEMS["quadratic 20"]
    best = f(iterates(steepest.LBFGS, f, start, 10, **EXACT)[-1])
    scaled = iterates(steepest.LBFGS, lambda x: c * f(x), start, 10, **EXACT)
    torch.testing.assert_close(f(scaled[-1]), best, rtol=1e-10, atol=0)


def test_closures_under_autocast_change_no_product_of_the_step() -> None:
    def trained(inside: bool, outside: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        x, y = torch.randn(16, 8), torch.randn(16, 4)
        optimizer = steepest.LBFGS(model.parameters(), max_iter=6)

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                loss = (model(x).float() - y).square().mean()
                loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            for _ in range(3):
                loss = optimizer.step(closure)
        assert loss < 2
        return model.weight.detach()

    assert torch.equal(trained(True, True), trained(True, False))
    assert torch.equal(trained(False, True), trained(False, False))
