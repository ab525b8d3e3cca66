"""What K-FAC doesn't depend on: parts and means of a batch, the scale of the loss, linear coordinates of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import steepest
from steepest.engine.capturing import CapturingOptimizer
from steepest.rule import Statistics, Step
from steepest.rules.ekfac import Ekfac
from steepest.rules.kfac import Kfac, LayerFisher

STEPS, N = 4, 12


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for k, p in enumerate(model.parameters()):
        p.data = 0.5 * draw(*p.shape, seed=k)
    return model


def data(step: int) -> tuple[Tensor, Tensor]:
    return draw(N, 5, seed=100 + step), torch.randint(3, (N,), generator=torch.Generator().manual_seed(step))


Backward = Callable[[nn.Module, CapturingOptimizer, Tensor, Tensor], None]


def trained(backward: Backward, **options: Any) -> list[Tensor]:
    model = net()
    optimizer = steepest.KFAC(model, **{"settle": 2, "statistics_frequency": 2} | options)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, optimizer, *data(step))
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def plain(model: nn.Module, optimizer: CapturingOptimizer, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()


def in_parts(model: nn.Module, optimizer: CapturingOptimizer, x: Tensor, y: Tensor) -> None:
    for a, b in zip(x.chunk(3), y.chunk(3), strict=True):
        (cross_entropy(model(a), b) / 3).backward()


def summed(model: nn.Module, optimizer: CapturingOptimizer, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y, reduction="sum").backward()


def scaled(model: nn.Module, optimizer: CapturingOptimizer, x: Tensor, y: Tensor) -> None:
    (7 * cross_entropy(model(x), y)).backward()


def sampled(factor: float) -> Backward:
    def backward(model: nn.Module, optimizer: CapturingOptimizer, x: Tensor, y: Tensor) -> None:
        logits = model(x)
        optimizer.sample(logits, "categorical")
        (factor * cross_entropy(logits, y)).backward()

    return backward


def expect_same(xs: list[Tensor], ys: list[Tensor], tolerance: float = 1e-11) -> None:
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kl_clip", [0.0, 1e-2])
def test_a_batch_in_parts_is_a_batch(kl_clip: float) -> None:
    expect_same(trained(in_parts, kl_clip=kl_clip), trained(plain, kl_clip=kl_clip))


def test_a_sum_of_losses_takes_the_step_of_their_mean() -> None:
    """Its gradients and its Fisher matrix are both N times as large; without a clip, which measures the loss."""
    expect_same(trained(summed, kl_clip=0.0, loss_terms="sum"), trained(plain, kl_clip=0.0))


def test_the_scale_of_the_loss_is_a_scale_of_the_step() -> None:
    """Empirical factors B grow by 49, and gradients by 7; ⟨D, G⟩, and with it the clip, stays."""
    for kl_clip in (0.0, 1e-3):
        expect_same(trained(scaled, kl_clip=kl_clip, lr=7.0), trained(plain, kl_clip=kl_clip, lr=1.0))


def test_with_sampled_targets_and_the_clip_the_scale_of_the_loss_is_no_matter() -> None:
    expect_same(*(trained(sampled(c), fisher="sampled", kl_clip=1e-6) for c in (7.0, 1.0)))


@pytest.mark.parametrize("rule", [Kfac(), Kfac(form="eigen"), Ekfac()], ids=lambda rule: f"{rule.name} {rule.in_basis}")
def test_scaled_factors_scale_the_direction(rule: LayerFisher) -> None:
    def direction(a: float, b: float) -> Tensor:
        G, x, d = draw(1, 4, 6, seed=1), draw(1, 9, 6, seed=2), draw(1, 9, 4, seed=3)
        statistics = Statistics(a * x.mT @ x, b * d.mT @ d)
        t = torch.ones(1, 1, 1, dtype=torch.float64)
        D = rule.update(G, rule.init(G), Step(t, rule.stage(0), slice(0, 1), statistics=statistics))
        assert D is not None
        return D

    torch.testing.assert_close(direction(7.0, 49.0) * 343, direction(1.0, 1.0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [steepest.KFAC, steepest.EKFAC])
def test_one_sample_has_the_factors_of_shampoo(kind: type[CapturingOptimizer]) -> None:
    model = nn.Linear(3, 4).double()
    optimizer = kind(model)
    x, y = draw(1, 3, seed=1), draw(1, 4, seed=2)
    (model(x) - y).square().sum().backward()
    G = torch.cat([model.weight.grad, model.bias.grad.unsqueeze(1)], dim=1)  # type: ignore[list-item, union-attr]
    optimizer.step()
    for factor, gram in (
        (optimizer.state[model.weight]["B"], G @ G.mT),
        (optimizer.state[model.weight]["A"], G.mT @ G),
    ):
        torch.testing.assert_close(factor / factor.trace(), gram / gram.trace(), rtol=1e-12, atol=1e-12)


class Coordinates(nn.Module):
    """A network whose first layer reads and writes in other linear coordinates than the function that it is."""

    def __init__(self, reads: Tensor, writes: Tensor) -> None:
        super().__init__()
        self.reads, self.writes = reads, writes
        first, _, self.last = net()
        self.first = nn.Linear(5, 6).double()
        self.first.weight.data = writes @ first.weight.data @ torch.inverse(reads)
        self.first.bias.data = writes @ first.bias.data

    def forward(self, x: Tensor) -> Tensor:
        s: Tensor = self.first(x @ self.reads.mT) @ torch.inverse(self.writes).mT
        y: Tensor = self.last(s.tanh())
        return y


def test_linear_coordinates_of_a_layer_are_no_matter_without_damping() -> None:
    """This is what K-FAC is for (Martens and Grosse, section 10)."""
    x, y = draw(40, 5, seed=1), draw(40, 3, seed=2)

    def outputs(reads: Tensor, writes: Tensor) -> Tensor:
        model = Coordinates(reads, writes)
        optimizer = steepest.KFAC(model, lr=0.3, damping=0.0, kl_clip=1e-3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (model(x) - y).square().sum(-1).mean().backward()
            optimizer.step()
        return model(x).detach()

    eye = [torch.eye(d, dtype=torch.float64) for d in (5, 6)]
    other = [one + 0.4 * draw(*one.shape, seed=3) for one in eye]
    moved = (outputs(*eye) - Coordinates(eye[0], eye[1])(x)).abs().max()
    assert moved > 1e-2
    torch.testing.assert_close(outputs(*other), outputs(*eye), rtol=1e-8, atol=1e-8)
