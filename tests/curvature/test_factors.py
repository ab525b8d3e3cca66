"""Factors over batches: what they are over, what they leave alone, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from checked import close, mlp
from torch import nn
from torch.nn import functional as F

from steepest.curvature import KroneckerFactors, kfac_factors
from steepest.curvature.factors import find_loss_terms
from steepest.curvature.moments import Inbox

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 2, 1, 0])


def net() -> nn.Module:
    torch.manual_seed(0)
    return mlp(dtype=torch.float64)


def equal(ours: dict[str, KroneckerFactors], theirs: dict[str, KroneckerFactors], scale: float = 1.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, factors in ours.items():
        close(factors.A, theirs[name].A)
        close(factors.B, theirs[name].B * scale)
        if factors.S is not None and theirs[name].S is not None:
            close(factors.S, theirs[name].S * scale, 1e-10)


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_batches_of_any_sizes_are_one_data_set(fisher):
    model = net()
    whole = kfac_factors(model, [(X, Y)], F.cross_entropy, fisher=fisher, eigenvalues=True)
    parts = [(X[:1], Y[:1]), (X[1:4], Y[1:4]), (X[4:], Y[4:])]
    equal(kfac_factors(model, parts, F.cross_entropy, fisher=fisher, eigenvalues=True), whole)
    total = nn.CrossEntropyLoss(reduction="sum")
    scale = 36 if fisher == "empirical" else 6  # the empirical Fisher counts the loss' factor twice
    equal(kfac_factors(model, parts, total, fisher=fisher), whole, scale=6)
    equal(kfac_factors(model, parts, lambda f, y: 6 * F.cross_entropy(f, y), fisher=fisher), whole, scale=scale)


def test_empirical_factors_are_of_single_samples_gradients():
    model = net()
    factors = kfac_factors(model, [(X, Y)], F.cross_entropy)
    found = torch.zeros(8, 8, dtype=torch.float64)
    for x, y in zip(X.split(1), Y.split(1), strict=True):
        (b,) = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].bias)  # is δ
        found += torch.outer(b, b) / 6
    close(factors["0"].B, found)


def test_model_and_gradients_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double().eval()
    model[0].weight.grad = torch.ones(6, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for fisher in ("empirical", "sampled", "type2"):
        with torch.no_grad():
            first = kfac_factors(model, [(X, Y)], F.cross_entropy, fisher=fisher)
        equal(kfac_factors(model, [(X, Y)], F.cross_entropy, fisher=fisher), first)
    assert not model.training
    assert torch.equal(model[0].weight.grad, torch.ones(6, 4).double())
    assert model[3].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_after_an_error():
    model = net()
    with pytest.raises(ZeroDivisionError) as caught:
        kfac_factors(model, [(X, Y)], lambda f, y: 1 / 0, loss_terms="rows")
    assert caught.tb  # it keeps the function's objects from being collected
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_are_summed_in_the_first_of_several_passes(monkeypatch):
    calls, add = [], Inbox.add_inputs
    monkeypatch.setattr(Inbox, "add_inputs", lambda *args: calls.append(1) or add(*args))
    kfac_factors(net(), [(X, Y), (X, Y)], F.cross_entropy, fisher="type2")
    assert len(calls) == 2 * 3


def test_frozen_layers_are_left_out():
    model = net()
    model[2].requires_grad_(False)
    assert list(kfac_factors(model, [(X, Y)], F.cross_entropy, fisher="type2", eigenvalues=True)) == ["0", "4"]


def test_groups_have_a_dimension_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(18, 3)).double()
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    factors = kfac_factors(model, [(x, Y)], F.cross_entropy, fisher="type2", eigenvalues=True)
    assert factors["0"].A.shape == (2, 5, 5)
    assert factors["0"].S.shape == (2, 3, 5)
    assert factors["2"].S.shape == (3, 19)
    V = torch.randn(2, 3, 5, dtype=torch.float64)
    solved = factors["0"].solve(V, 0.1)
    torch.testing.assert_close(factors["0"] @ solved + 0.1 * solved, V, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_ekfac_without_sharing_has_the_exact_diagonal(fisher):
    """The trace of EKFAC is that of the Fisher itself, of single samples' gradients."""
    model = net()
    factors = kfac_factors(model, [(X, Y)], F.cross_entropy, eigenvalues=True)
    total = 0.0
    for x, y in zip(X.split(1), Y.split(1), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        total += sum(float(g.square().sum()) for g in gradients) / 6
    assert sum(float(f.eigenvalues.sum()) for f in factors.values()) == pytest.approx(total, rel=1e-10)


REDUCTIONS = [
    (F.cross_entropy, Y, "rows"),
    (nn.CrossEntropyLoss(reduction="sum"), Y, "sum"),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()), Y, "rows"),
    (F.mse_loss, torch.ones(6, 3).double(), "rows"),
    (lambda f, y: (f - y).square().sum(), torch.ones(6, 3).double(), "sum"),
    (F.binary_cross_entropy_with_logits, torch.ones(6, 3).double(), "rows"),
]


@pytest.mark.parametrize(("loss", "targets", "word"), REDUCTIONS)
def test_reductions_are_found_out(loss, targets, word):
    assert find_loss_terms(loss, torch.randn(6, 3, dtype=torch.float64), targets) == word


def test_reductions_that_cannot_be_found_out():
    model = net()
    zero = torch.zeros(6, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="loss_terms=None"):
        find_loss_terms(nn.MSELoss(), zero, zero)
    with pytest.raises(ValueError, match="loss_terms=None"):
        kfac_factors(model, [(X, None)], lambda f, y: f.square().sum())
    found = kfac_factors(model, [(X, None)], lambda f, y: f.square().sum(), loss_terms="sum")
    equal(found, kfac_factors(model, [(X, zero)], nn.MSELoss(reduction="sum")))
    with pytest.raises(ValueError, match="loss_terms='tokens': must be"):
        kfac_factors(model, [(X, Y)], F.cross_entropy, loss_terms="tokens")


def test_padded_tokens():
    """Positions that the loss leaves out count neither in the Fisher nor in the number of its terms."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.tensor([[0, 1, 2], [1, -100, -100]])

    def loss(f, t):
        return F.cross_entropy(f.flatten(0, 1), t.flatten())

    found = kfac_factors(model, [(x, y)], loss, loss_terms=4)[""]
    kept = y != -100
    wanted = kfac_factors(model, [(x[kept], y[kept])], F.cross_entropy)[""]
    close(found.B, wanted.B)
    exact = kfac_factors(model, [(x, y)], loss, fisher="type2", loss_terms=4)[""]
    wanted = kfac_factors(model, [(x[kept], y[kept])], F.cross_entropy, fisher="type2")[""]
    close(exact.B, wanted.B)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda f, y: f.abs().sum(-1).mean(), "linear in the outputs"),
        (lambda f, y: f.sin().sum(-1).mean(), "not convex"),
        (lambda f, y: f.sum(0).square().sum(), "no sum over rows"),
    ],
)
def test_losses_without_an_exact_fisher(loss, message):
    with pytest.raises(ValueError, match=message):
        kfac_factors(net(), [(X, Y)], loss, fisher="type2", loss_terms="rows")


def test_words_that_are_not_known():
    with pytest.raises(ValueError, match="fisher='exact': must be one of 'empirical', 'sampled', 'type2'"):
        kfac_factors(net(), [(X, Y)], F.cross_entropy, fisher="exact")
    with pytest.raises(ValueError, match="sharing='both'"):
        kfac_factors(net(), [(X, Y)], F.cross_entropy, sharing="both")
