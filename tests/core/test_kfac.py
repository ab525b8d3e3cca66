"""K-FAC within a training loop: what its trajectory may depend on, and what it must not."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import steepest

KINDS = (steepest.KFAC, steepest.EKFAC)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int, rows: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator).to(dtype), torch.randn(rows, 3, generator=generator).to(dtype)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over rows."""
    return (outputs - targets).square().sum(-1).mean()


def train(model: nn.Module, opt: torch.optim.Optimizer, batches: range, scale: float = 1.0) -> None:
    for number in batches:
        x, y = batch(number)
        opt.zero_grad()
        outputs = model(x)
        opt.sample(outputs, "normal")
        (scale * squares(outputs, y)).backward()
        opt.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def factors(opt: torch.optim.Optimizer) -> list[Tensor]:
    """What statistics change: copies of A and B, and the count of how many came in."""
    return [s[name].clone() for s in opt.state.values() for name in ("A", "B", "statistics") if name in s]


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def close(x: Tensor, y: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


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
    model.eval()
    squares(model(x), y).backward()
    model.train()
    with torch.no_grad():
        model(x)
    opt.zero_grad()
    train(model, opt, range(2, 4))
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
