"""When statistics come into K-FAC's factors: not from passes that are not trained on, nor from what is not finite."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from layered import KINDS, batch, factors, mlp, same, squares, train, weights
from torch import Tensor, nn

import steepest


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# When statistics come in.


def test_factors_change_when_statistics_are_due_and_only_then():
    model = mlp()
    opt = steepest.KFAC(model, settle=2, statistics_frequency=3)
    due = []
    for number in range(9):
        before = factors(opt)
        wanted = opt.wants_statistics
        train(model, opt, range(number, number + 1))
        assert same(before, factors(opt)) is not wanted
        due.append(wanted)
    assert due == [True, True, False, True, False, False, True, False, False]


def test_evaluation_changes_no_factor():
    model = mlp()
    opt, twin = steepest.KFAC(model), copy.deepcopy(model)
    train(model, opt, range(2))
    other = steepest.KFAC(twin)
    train(twin, other, range(2))
    x, y = batch(7)
    opt.zero_grad()
    model.eval()
    torch.autograd.grad(squares(model(x), y), list(model.parameters()))  # no zero_grad follows, which would forget it
    model.train()
    with torch.no_grad():
        model(x)
    squares(model(batch(2)[0]), batch(2)[1]).backward()
    opt.step()
    train(model, opt, range(3, 4))
    train(twin, other, range(2, 4))
    assert same(factors(opt), factors(other))
    assert torch.equal(weights(model), weights(twin))


def test_inputs_are_saved_only_for_statistics():
    model = mlp()
    x, y = batch(0)

    def saved() -> int:
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
            model(x)
        return len(packed)

    plain = saved()
    opt = steepest.KFAC(model, settle=0, statistics_frequency=10)
    assert saved() == plain + 3
    squares(model(x), y).backward()
    opt.step()
    assert saved() == plain


@pytest.mark.parametrize("order", ["zero_grad first", "sample first"])
def test_the_order_of_zero_grad_and_sample(order):
    model, (x, y) = mlp(), batch(0)
    opt = steepest.KFAC(model, fisher="sampled")
    outputs = model(x)
    if order == "zero_grad first":
        opt.zero_grad()
        opt.sample(outputs, "normal")
    else:
        opt.sample(outputs, "normal")
        opt.zero_grad()
    squares(outputs, y).backward()
    opt.step()
    assert opt.state[model[0].weight]["statistics"].item() == 1


def test_zero_grad_forgets_what_came_with_gradients():
    model = mlp()
    twin = copy.deepcopy(model)
    opt, other = steepest.KFAC(model), steepest.KFAC(twin)
    x, y = batch(5)
    (3 * squares(model(x), y)).backward()  # a step that is never taken
    train(model, opt, range(2))
    train(twin, other, range(2))
    assert torch.equal(weights(model), weights(twin))


# What is not finite.


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("where", ["inputs", "targets", "gradients"])
def test_a_batch_that_is_not_finite_leaves_no_trace(make, when, where):
    model = mlp()
    twin = copy.deepcopy(model)
    opt, other = make(model), make(twin)
    train(model, opt, range(when))
    train(twin, other, range(when))
    before, state = weights(model), factors(opt)
    x, y = batch(50)
    {"inputs": x, "targets": y, "gradients": torch.empty(1, 1)}[where][0] = torch.nan
    opt.zero_grad()
    squares(model(x), y).backward()
    for p in model.parameters():
        if where == "gradients":
            p.grad[0] = torch.nan
    opt.step()
    assert torch.equal(weights(model), before)
    assert same(factors(opt), state)
    assert opt.skipped == 3
    train(model, opt, range(when, when + 3))
    train(twin, other, range(when, when + 3))
    assert torch.equal(weights(model), weights(twin))
    assert opt.skipped == 3


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("when", [0, 2])
def test_statistics_that_are_not_finite(make, when):
    """Gradients are, so the step is taken with the factors that there are; without any, nothing moves."""
    model = mlp()
    opt = make(model, fisher="sampled")
    train(model, opt, range(when))
    before, state = weights(model), factors(opt)
    x, y = batch(50)
    opt.zero_grad()
    outputs = model(x)
    opt.sample(outputs * torch.nan, "normal")
    squares(outputs, y).backward()
    opt.step()
    assert same(factors(opt), state)
    assert weights(model).isfinite().all()
    assert torch.equal(weights(model), before) is (when == 0)
    assert opt.failed_decompositions == 3
    train(model, opt, range(when, when + 2))
    assert weights(model).isfinite().all()
    assert not torch.equal(weights(model), before)
    assert opt.failed_decompositions == 3


# Hooks.


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("how", ["detach", "garbage"])
def test_no_hook_is_left(how):
    model = mlp()
    opt = steepest.KFAC(model)
    train(model, opt, range(1))
    assert hooks(model) == 4
    if how == "detach":
        opt.detach()
        assert not opt.wants_statistics
        assert hooks(model) == 0
        state = factors(opt)
        train(model, opt, range(1, 3))  # steps go on
        assert same(state, factors(opt))
    else:
        opt.zero_grad()
        del opt
        gc.collect()
        assert hooks(model) == 0


class Net(nn.Module):
    """One of its layers is not called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x).tanh(), self.b.weight, self.b.bias)


def test_layers_without_statistics_are_named():
    model = Net()
    opt = steepest.KFAC(model)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"b\.weight: a gradient, but no .*overrides=\{'b.weight': 'soap'\}"):
        train(model, opt, range(1))
    assert torch.equal(weights(model), before)
    train(model, steepest.KFAC(model, overrides={"b.weight": "soap"}), range(2))
    assert not torch.equal(weights(model), before)


def test_detached_before_there_were_statistics():
    model = mlp()
    opt = steepest.KFAC(model)
    opt.detach()
    with pytest.raises(RuntimeError, match=r"0\.weight.*before detach\(\): build a new optimizer"):
        train(model, opt, range(1))


def test_no_targets_were_drawn():
    model, (x, y) = mlp(), batch(0)
    opt = steepest.KFAC(model, fisher="sampled")
    squares(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r'no targets were drawn.*optimizer\.sample\(outputs, "categorical"\)'):
        opt.step()
