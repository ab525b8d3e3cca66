"""K-FAC in training loops: when statistics are due, what is missing or not finite, clips, scalers, and hooks."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from kfac_training import draw, everything, net, of, same, train
from torch import Tensor, nn
from torch.nn.functional import linear

import steepest
from steepest.engine.capturing import CapturingOptimizer
from steepest.rule import Statistics, Step
from steepest.rules.kfac import Kfac

KINDS = [steepest.KFAC, steepest.EKFAC]


# When.


def test_statistics_are_due_at_first_and_then_seldom() -> None:
    model = net()
    optimizer = steepest.KFAC(model, settle=3, statistics_frequency=4, precondition_frequency=6)
    weight, captured, refreshed = model[0].weight, [], []
    for step in range(14):
        A, P = (optimizer.state[weight][name].clone() for name in ("A", "P_A"))
        wanted = optimizer.wants_statistics
        train(model, optimizer, [step])
        assert wanted == (not torch.equal(A, optimizer.state[weight]["A"]))
        captured += [step] * wanted
        refreshed += [step] * (not torch.equal(P, optimizer.state[weight]["P_A"]))
    assert captured == [0, 1, 2, 4, 8, 12]
    assert refreshed == [0, 1, 2, 6, 12]


def test_passes_that_are_not_captured_save_nothing_and_change_nothing() -> None:
    model = net()
    optimizer = steepest.KFAC(model, settle=0, statistics_frequency=3)
    x = draw(8, 4, seed=0)
    assert "Through" in model(x).grad_fn.name()
    train(model, optimizer, [0])
    assert "Addmm" in model(x).grad_fn.name()
    train(model, optimizer, [1, 2])
    before = everything(model, optimizer)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    model.train()
    assert same(before, everything(model, optimizer))
    train(model, optimizer, [3])
    twin = net()
    reference = steepest.KFAC(twin, settle=0, statistics_frequency=3)
    train(twin, reference, range(4))
    assert same(everything(model, optimizer), everything(twin, reference))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_training_resumes_in_the_middle_of_a_period_bit_for_bit(kind: Any, fisher: str) -> None:
    options = {"fisher": fisher, "settle": 2, "statistics_frequency": 3, "precondition_frequency": 4}

    def steps(model: nn.Module, optimizer: CapturingOptimizer, numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            y = model(draw(8, 4, seed=step))
            optimizer.sample(y, "normal")
            y.square().mean().backward()
            optimizer.step()

    model = net()
    optimizer = kind(model, **options)
    steps(model, optimizer, range(5))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    copied = copy.deepcopy((model, optimizer))
    alone = copy.deepcopy(optimizer)
    steps(model, optimizer, range(5, 12))

    other = net()
    resumed = kind(other, **options)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for twin, its in ((other, resumed), copied, (alone._model, alone)):
        steps(twin, its, range(5, 12))
        assert same(everything(twin, its), everything(model, optimizer))


def test_draws_leave_gradients_and_the_random_numbers_of_others_alone() -> None:
    model = net()
    optimizer = steepest.KFAC(model, fisher="sampled")
    y = model(draw(8, 4, seed=0))
    before = torch.get_rng_state()
    optimizer.sample(y, "normal")
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="likelihood='poisson'"):
        optimizer.sample(y, "poisson")


# What is missing.


class Bypassed(nn.Module):
    """A layer whose module is called, and one whose weight is used without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.called(x), self.bypassed.weight, self.bypassed.bias)


def test_a_layer_that_was_never_heard_is_named_before_anything_moves() -> None:
    model = Bypassed().double()
    optimizer = steepest.KFAC(model)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"^bypassed.weight: .*overrides=\{'bypassed.weight': 'soap'\}"):
        train(model, optimizer, [0])
    assert same(before, everything(model, optimizer))
    other = steepest.KFAC(model, overrides={"bypassed.weight": "soap"})
    train(model, other, [0])
    assert not any(torch.equal(x, y) for x, y in zip(of(model), before, strict=False))


def test_targets_that_were_never_drawn_are_missed() -> None:
    model = net()
    with pytest.raises(RuntimeError, match=r"no targets were drawn.*optimizer\.sample\(outputs"):
        train(model, steepest.KFAC(model, fisher="sampled"), [0])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.uses_late = nn.Linear(4, 3), nn.Linear(4, 3), False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.late(x) if self.uses_late else self.first(x)
        return y


def test_a_layer_that_comes_late_waits_for_statistics_and_settles() -> None:
    model = Branches().double()
    optimizer = steepest.KFAC(model, settle=0, statistics_frequency=50)
    train(model, optimizer, [0, 1])
    model.uses_late = True
    before = everything(model, optimizer)
    train(model, optimizer, [2])  # nothing is due
    assert same(before, everything(model, optimizer))
    assert optimizer.wants_statistics
    train(model, optimizer, [3])
    assert optimizer.state[model.late.weight]["step"] == 1
    assert not torch.equal(model.late.weight, before[2])


def test_old_statistics_do_where_new_ones_are_due_and_missing() -> None:
    model = net()
    optimizer = steepest.KFAC(model, settle=0, statistics_frequency=1)
    train(model, optimizer, [0])
    A = optimizer.state[model[0].weight]["A"].clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = of(model)
    optimizer.step()
    assert torch.equal(A, optimizer.state[model[0].weight]["A"])
    assert not any(torch.equal(x, y) for x, y in zip(before, of(model), strict=True))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_half_of_a_layer_that_freezes_stays_and_the_other_half_goes_on(name: str) -> None:
    model = net()
    optimizer = steepest.KFAC(model)
    train(model, optimizer, [0])
    frozen, other = model[0].weight, model[0].bias
    frozen, other = (other, frozen) if name == "bias" else (frozen, other)
    frozen.requires_grad_(False)
    before = [frozen.clone(), other.clone()]
    train(model, optimizer, [1, 2])
    assert torch.equal(frozen, before[0])
    assert not torch.equal(other, before[1])


def test_a_bias_that_is_frozen_from_the_start_is_in_no_matrix() -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    optimizer = steepest.KFAC(model)
    assert optimizer.state[model[0].weight]["A"].shape == (4, 4)
    assert [group["rule"] for group in optimizer.param_groups] == ["kfac", "adamw"]
    assert optimizer.param_groups[1]["param_names"] == ["2.bias"]
    train(model, optimizer, [0, 1])


def test_a_layer_is_added_as_a_group_of_its_own() -> None:
    model = net()
    for p in model[2].parameters():
        p.requires_grad_(False)
    optimizer = steepest.KFAC(model, settle=0, statistics_frequency=3)
    train(model, optimizer, [0, 1])
    params = list(model[2].named_parameters())
    for p in model[2].parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": params, "bias": True})
    before = of(model)
    train(model, optimizer, [2, 3])
    assert not any(torch.equal(x, y) for x, y in zip(before, of(model), strict=True))
    optimizer.add_param_group({"params": [("scale", nn.Parameter(torch.ones(2)))], "rule": "adamw", "lr": 0.1})
    for bad in (nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))):
        with pytest.raises(ValueError, match="in no layer that can be captured"):
            optimizer.add_param_group({"params": [bad]})


# What is not finite.


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_nan_changes_nothing_and_the_next_one_goes_on(kind: Any) -> None:
    model, twin = net(), net()
    optimizer, reference = kind(model), kind(twin)
    train(model, optimizer, [0])
    train(twin, reference, [0])
    before = everything(model, optimizer)
    optimizer.zero_grad()
    (model(draw(8, 4, seed=1)).sum() * math.nan).backward()
    optimizer.step()
    assert same(before, everything(model, optimizer))
    assert optimizer.skipped == 2
    train(model, optimizer, [2, 3])
    train(twin, reference, [2, 3])
    assert same(everything(model, optimizer), everything(twin, reference))


@pytest.mark.parametrize("form", ["inverse", "eigen"])
def test_statistics_that_are_not_finite_leave_the_factors(form: str) -> None:
    """Gradients δ of 1e25 with inputs of 1e-20: their product is a number, the square of δ is none in float32."""
    model = nn.Linear(3, 2, bias=False)
    optimizer = steepest.KFAC(model, form=form)
    train(model, optimizer, [0], shape=(8, 3))
    state = optimizer.state[model.weight]
    before = {name: x.clone() for name, x in state.items()}
    optimizer.zero_grad()
    (model(torch.full((4, 3), 1e-20)).sum() * 1e25).backward()
    W = model.weight.detach().clone()
    optimizer.step()
    assert all(torch.equal(state[name], before[name]) for name in ("A", "B", "statistics"))
    assert not torch.equal(model.weight, W)
    assert (optimizer.failed_decompositions, optimizer.skipped) == (1, 0)
    assert model.weight.isfinite().all()


def test_without_statistics_that_are_finite_a_layer_stays() -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = steepest.KFAC(model)
    before = of(model)
    (model(torch.full((4, 3), 1e-20)).sum() * 1e25).backward()
    optimizer.step()
    assert same(before, of(model))


def test_an_inverse_that_fails_is_the_old_one() -> None:
    rule, G = Kfac(kl_clip=0.0, factor_beta=0.0), torch.eye(2).repeat(2, 1, 1)
    state, failures = rule.init(G), torch.zeros(2, dtype=torch.int64)
    good, bad = torch.eye(2).repeat(2, 1, 1), torch.stack([torch.eye(2), torch.tensor([[1.0, 3.0], [3.0, 1.0]])])
    for t, B in ((1, good), (2, bad)):
        step = Step(
            torch.full((2, 1, 1), float(t)), rule.stage(t - 1), slice(0, 2), None, failures, Statistics(good, B)
        )
        D = rule.update(G, state, step)
    assert failures.tolist() == [0, 1]
    torch.testing.assert_close(state["P_B"], torch.eye(2).repeat(2, 1, 1) / 1.1)
    assert D is not None
    assert D.isfinite().all()


def test_a_layer_without_curvature_stays_finite() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -100.0)  # dead: B of the first layer, and A of the second but for its bias, are 0
    optimizer = steepest.KFAC(model)
    train(model, optimizer, range(3), shape=(8, 3))
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.failed_decompositions == 0


# Clip and scalers.


@pytest.mark.parametrize(("kappa", "active"), [(1e-3, True), (1e9, False)])
def test_one_number_clips_all_directions(kappa: float, active: bool) -> None:
    model, twin = net(), net()
    before = of(model)
    train(model, steepest.KFAC(model, lr=0.3, momentum=0.0, kl_clip=kappa), [0])
    train(twin, steepest.KFAC(twin, lr=0.3, momentum=0.0, kl_clip=0.0), [0])
    clipped, free = ([(x - p) / 0.3 for x, p in zip(before, of(m), strict=True)] for m in (model, twin))
    grads = [p.grad for p in model.parameters()]
    slope = sum(float((d * g).sum()) for d, g in zip(free, grads, strict=True))  # type: ignore[operator]
    factor = min(1.0, math.sqrt(kappa / slope))
    assert (factor < 1) == active
    for c, d in zip(clipped, free, strict=True):
        torch.testing.assert_close(c, factor * d, rtol=1e-10, atol=1e-12)


def test_a_matrix_that_is_skipped_is_not_in_the_clip() -> None:
    """A layer beside another one, and the layer alone."""
    pair, alone = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double(), nn.Linear(4, 3).double()
    alone.load_state_dict(pair[0].state_dict())
    x = draw(8, 4, seed=0)
    optimizers = steepest.KFAC(pair, loss_terms=8), steepest.KFAC(alone, loss_terms=8)
    (pair[0](x).square().mean() + pair[1](x).sum() * math.nan).backward()
    alone(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert same(of(pair[0]), of(alone))


def test_a_scaler_of_the_loss_changes_nothing() -> None:
    def trained(scaled: bool) -> list[Tensor]:
        model = net(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled, growth_interval=2)
        optimizer = steepest.KFAC(model, grad_scaler=scaler)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(draw(8, 4, seed=step, dtype=torch.float32)).square().mean()
            scaler.scale(loss * (math.inf if step == 1 and scaled else 1.0)).backward()  # type: ignore[no-untyped-call]
            if step != 1 or scaled:
                scaler.step(optimizer)
                scaler.update()
        return of(model)

    for ours, expected in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# Hooks.


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_go_with_the_optimizer_or_before() -> None:
    model = net()
    optimizer = steepest.EKFAC(model)
    assert hooks(model)
    train(model, optimizer, range(2))
    optimizer.detach()
    assert (hooks(model), optimizer.wants_statistics) == (0, False)
    before = of(model)
    train(model, optimizer, [2])
    assert not same(before, of(model))
    gc.disable()
    try:
        other = steepest.EKFAC(model)
        train(model, other, range(2))
        del other
        assert hooks(model) == 0
    finally:
        gc.enable()
    early = steepest.KFAC(model)
    early.detach()
    with pytest.raises(RuntimeError, match="no statistics were captured before detach"):
        train(model, early, [0])
