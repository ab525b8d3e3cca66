"""Residuals at points: their values, their Jacobian, and the differential equations that are made of them."""

import math

import pytest
import torch
from networks import network, random
from torch import nn
from torch.func import functional_call, grad, jacrev

from steepest.lab.workloads.problems import PROBLEMS, cole_hopf
from steepest.newton import residual as module
from steepest.newton.residual import Residual, Rows, half_square, joined, summed


def jacobian(model, params, r):
    """Row by row, by torch's own functional form of the whole."""
    rows = jacrev(lambda params: functional_call(model, params, ()))(params)
    return torch.cat([rows[name].reshape(len(r), -1) for name in params], 1)


class Whole(nn.Module):
    """All residuals at once, without vmap, as a module around the model."""

    def __init__(self, model, residuals):
        super().__init__()
        self.model, self.residuals = model, residuals

    def forward(self):
        found = []
        for residual in self.residuals:
            rows = [residual.function(lambda *x: squeezed(self.model(*x)), *point) for point in zip(*residual.data)]  # noqa: B905
            found.append(math.sqrt(residual.weight / len(residual)) * torch.stack(rows).reshape(-1))
        return torch.cat(found)


def squeezed(outputs):
    return outputs.reshape(()) if outputs.numel() == 1 else outputs


def cases():
    x, y = random(7, 2), random(7, 1, seed=1)
    number = Residual(lambda u, x, y: u(x) - y[0], x, y)
    vector = Residual(lambda u, x: torch.stack([u(x) ** 2, u(2 * x), x[0] * u(x)]), x[:5], weight=3.0)
    slope = Residual(lambda u, x: grad(u)(x), x, weight=0.5)
    return {"number": [number], "vector": [vector], "several": [number, slope, vector]}


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("numbers", [2**23, 100], ids=["whole", "in blocks"])
def test_the_jacobian_is_that_of_all_residuals_at_once(case, numbers, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS", numbers)
    model, residuals = network(2, 5, 1), cases()[case]
    params = dict(model.named_parameters())
    rows = Rows(model, residuals, params)
    J, r = rows.dense()
    whole = Whole(model, residuals)
    torch.testing.assert_close(r, whole().detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(r, joined(model, residuals), rtol=0, atol=1e-14)
    expected = jacobian(whole, {f"model.{name}": p.detach() for name, p in params.items()}, r)
    torch.testing.assert_close(J, expected, rtol=0, atol=1e-13)
    assert rows.shape == tuple(J.shape)
    loss = sum(residual.loss(model) for residual in residuals)
    assert half_square(r) == pytest.approx(loss.item(), rel=1e-14)


def test_the_weight_multiplies_the_mean_square():
    model, x = network(2, 1), random(4, 2)
    loss = Residual(lambda u, x: u(x), x, weight=6.0).loss(model)
    torch.testing.assert_close(loss, 3.0 * model(x).square().mean())


def test_outputs_of_several_numbers_stay_vectors():
    model, x = network(2, 3), random(4, 2)
    torch.testing.assert_close(Residual(lambda u, x: u(x), x).values(model), model(x))


def test_a_residual_may_read_other_parameters_of_the_model():
    """An unknown coefficient: its column of the Jacobian would be zero if the function met the model's own."""
    model = network(1, 3, 1)
    model.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    decay = Residual(lambda u, t: grad(u)(t)[0] + model.rate * u(t), random(6, 1))
    names = dict(model.named_parameters())
    J, _ = Rows(model, [decay], names).dense()
    column = list(names).index("rate")  # the first, of one number
    assert column == 0
    torch.testing.assert_close(J[:, 0], decay.factor * model(decay.data[0])[:, 0].detach())


def test_tied_weights_are_one_parameter_and_frozen_ones_none():
    model = network(3, 3, 3)
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fit = Residual(lambda u, x: u(x), random(2, 3))
    J, r = Rows(model, [fit], params).dense()
    assert J.shape == (6, 12)
    torch.autograd.backward(joined(model, [fit]), r)
    torch.testing.assert_close(J.mT @ r, torch.cat([p.grad.reshape(-1) for p in params.values()]))


class Counting(nn.Module):
    """A module that changes a buffer whenever it is called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_buffers_stay_as_they_are():
    model = Counting()
    fit = Residual(lambda u, x: u(x), random(5, 2))
    fit.loss(model)
    Rows(model, [fit], dict(model.named_parameters())).dense()
    assert model.calls == 0
    model(random(2))
    assert model.calls == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Residual(lambda u: u), "needs points"),
        (lambda: Residual(lambda u, x, y: u(x), random(3, 2), random(4)), r"shapes \[\[3, 2\], \[4\]\]"),
        (lambda: Residual(lambda u, x: u(x), random(0, 2)), "at least one"),
        (lambda: Residual(lambda u, x: u(x), torch.tensor(1.0)), "one row a point"),
        (lambda: Residual(lambda u, x: u(x), random(3, 2), weight=0.0), r"weight=0.0: must be a number above 0"),
        (lambda: Residual(lambda u, x: u(x), random(3, 2), weight=math.nan), "weight=nan"),
        (lambda: Residual(lambda u, x: torch.outer(x, x), random(3, 2)).loss(network(2, 1)), r"shape \[2, 2\]"),
        (lambda: Residual(lambda u, x: 1.0, random(3, 2)).loss(network(2, 1)), "must return a number or a vector"),
    ],
)
def test_what_is_no_residual_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# The problems.


@pytest.mark.parametrize("name", PROBLEMS)
def test_both_forms_of_a_problem_have_the_same_loss(name):
    problem = PROBLEMS[name]()
    torch.manual_seed(0)
    model = problem.network()
    loss, by_points = problem.loss(model), sum(residual.loss(model) for residual in problem.residuals)
    torch.testing.assert_close(loss, by_points, rtol=1e-13, atol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad(x, list(model.parameters())) for x in (loss, by_points)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Truth(nn.Module):
    """The solution of a problem in the place of a network."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        if self.name == "poisson":
            return (math.pi * x).sin().prod(-1, keepdim=True)
        return cole_hopf(x.reshape(-1, 2)).reshape(*x.shape[:-1], 1)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_truth_leaves_no_residual_and_no_error(name):
    problem = PROBLEMS[name]()
    assert problem.error(Truth(name)) < 1e-14
    for residual in problem.residuals:
        some = Residual(residual.function, *(x[::60] for x in residual.data))
        assert some.values(Truth(name)).abs().max() < 1e-10
    halved = nn.Sequential(Truth(name), nn.Linear(1, 1, dtype=torch.float64))
    nn.init.constant_(halved[1].weight, 0.5)
    nn.init.zeros_(halved[1].bias)
    assert problem.error(halved) == pytest.approx(0.5)


def test_a_sum_of_losses_ends_where_it_is_no_longer_below_what_was_asked():
    model, called = torch.nn.Linear(1, 1).double(), []

    def residual(name, value):
        def function(u, x):
            called.append(name)
            return u(x) * 0 + value

        return Residual(function, torch.ones(3, 1, dtype=torch.float64))

    residuals = [residual("a", 2.0), residual("b", 4.0), residual("c", math.nan), residual("d", 1.0)]
    for enough, expected, asked in ((100.0, math.nan, "abc"), (10.0, 10.0, "ab"), (2.0, 2.0, "a")):
        called.clear()
        assert summed(model, residuals, enough) == pytest.approx(expected, nan_ok=True)
        assert "".join(called) == asked
    with torch.no_grad():
        assert summed(model, residuals[:2], math.inf) == pytest.approx(sum(float(r.loss(model)) for r in residuals[:2]))
