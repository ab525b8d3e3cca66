"""What K-FAC's trajectory may depend on, and what it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from layered import KINDS, batch, close, mlp, squares, train, weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import steepest


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# How a loss is averaged, and what it is multiplied by.


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("how", ["sum", "micro-batches", "sum of micro-batches", "number", "function"])
def test_averaging_of_the_loss(make, how):
    """A sum over N rows has N times the gradient and N times the Fisher matrix, and so the same direction."""
    rows, summed, clip = 24, "sum" in how, 1e-3
    start = mlp()
    model, other = copy.deepcopy(start), copy.deepcopy(start)
    terms = {"number": rows, "function": lambda: torch.tensor(rows // 2)}.get(how, "sum" if summed else "rows")
    opt = make(model, kl_clip=clip)
    other_opt = make(other, kl_clip=clip * rows if summed else clip, loss_terms=terms)  # clips Σ⟨D, G⟩
    parts = 2 if "micro" in how or how == "function" else 1
    for number in range(4):
        x, y = batch(number, rows)
        for each in (opt, other_opt):
            each.zero_grad()
        squares(model(x), y).backward()
        for part, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (squares(other(part), targets) * (len(part) if summed else 1 / parts)).backward()
        opt.step()
        other_opt.step()
    close(weights(model), weights(other))
    assert (weights(model) - weights(start)).norm() > 0.01


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("make", KINDS)
def test_a_multiple_of_the_loss(make, fisher, clipped):
    """Only a clip that is active divides the scale out; the empirical Fisher matrix is quadratic in it."""
    c, lr, clip = 7.0, 0.02, 1e-4 if clipped else 0.0
    model = mlp()
    other = copy.deepcopy(model)
    if fisher == "sampled":
        scaled_lr = lr if clipped else lr / c  # D grows by c
    else:
        scaled_lr = lr * c  # D falls by c, and ⟨D, G⟩ stays
    train(model, make(model, lr, fisher=fisher, kl_clip=clip), range(4))
    train(other, make(other, scaled_lr, fisher=fisher, kl_clip=clip), range(4), scale=c)
    close(weights(model), weights(other))


class Mapped(nn.Module):
    """A layer between fixed linear maps: ``Φ (W̃ Ω x + b̃)``, the same function as the layer's own."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        m, n = layer.weight.shape
        Φ, Ω = (torch.eye(d) + 0.3 * torch.randn(d, d).double() for d in (m, n))  # far from orthogonal, conditions ~10
        self.register_buffer("outer", Φ)
        self.register_buffer("inner", Ω)
        self.layer = copy.deepcopy(layer)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linalg.solve(Φ, torch.linalg.solve(Ω.mT, layer.weight.mT).mT))
            if layer.bias is not None:
                self.layer.bias.copy_(torch.linalg.solve(Φ, layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.inner.mT) @ self.outer.mT


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_steps_do_not_depend_on_coordinates(damping):
    """The defining property of natural gradients; damping spoils it."""
    model = mlp()
    other = nn.Sequential(*[Mapped(part) if isinstance(part, nn.Linear) else part for part in model])
    x, _ = batch(100)
    close(model(x), other(x))
    before = model(x).detach()
    for each in (model, other):
        train(each, steepest.KFAC(each, 0.5, damping=damping), range(4))
    change, difference = (model(x) - before).norm(), (model(x) - other(x)).norm()
    assert difference < 1e-8 * change if damping == 0 else difference > 1e-3 * change


def test_one_sample():
    """Then Shampoo's covariances are K-FAC's factors up to scale."""
    model = nn.Linear(4, 3, bias=False).double()
    kfac, shampoo = steepest.KFAC(model), steepest.Shampoo(model.parameters())
    x, y = batch(0, rows=1)
    squares(model(x), y).backward()
    kfac.step()
    shampoo.step()
    ours, theirs = kfac.state[model.weight], shampoo.state[model.weight]
    for name, of_shampoo in (("A", "R"), ("B", "L")):
        close(ours[name] / ours[name].norm(), theirs[of_shampoo] / theirs[of_shampoo].norm())


# Ways of training.


def test_a_grad_scaler():
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)  # it grows meanwhile
    opt, other = steepest.KFAC(model, grad_scaler=scaler), steepest.KFAC(twin)
    for number in range(4):
        x, y = batch(number, dtype=torch.float32)
        if number == 2:  # the scaler skips this step
            opt.zero_grad()
            scaler.scale(squares(model(x), y) * torch.inf).backward()
            scaler.step(opt)
            scaler.update()
        opt.zero_grad()
        other.zero_grad()
        scaler.scale(squares(model(x), y)).backward()
        squares(twin(x), y).backward()
        scaler.step(opt)
        scaler.update()
        other.step()
    assert scaler.get_scale() > 2.0**10
    close(weights(model), weights(twin), 1e-4)
    for p, q in zip(opt.state, other.state, strict=True):
        if "B" in opt.state[p]:
            torch.testing.assert_close(opt.state[p]["B"], other.state[q]["B"], rtol=1e-3, atol=1e-7)


def test_autocast():
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    opt, other = steepest.KFAC(model), steepest.KFAC(twin)
    x, y = batch(0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = squares(model(x), y)
    loss.backward()
    squares(twin(x), y).backward()
    opt.step()
    other.step()
    for name in ("A", "B"):
        ours, theirs = opt.state[model[2].weight][name], other.state[twin[2].weight][name]
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_schedule_acts_on_clipped_steps():
    model = mlp()
    twin = copy.deepcopy(model)
    opt, other = steepest.KFAC(model, 1.0, kl_clip=1e-4), steepest.KFAC(twin, 1.0, kl_clip=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.25)
    before = weights(model)
    train(model, opt, range(1))
    train(twin, other, range(1))
    schedule.step()
    close(4 * (weights(model) - before), weights(twin) - before)


def test_it_learns_to_classify():
    model = mlp(torch.float32)
    opt = steepest.KFAC(model, fisher="sampled")
    x, _ = batch(0, 64, torch.float32)
    labels = x[:, :3].argmax(1)
    for _ in range(30):
        opt.zero_grad()
        logits = model(x)
        opt.sample(logits, "categorical")
        cross_entropy(logits, labels).backward()
        opt.step()
    assert cross_entropy(model(x), labels) < 0.3
