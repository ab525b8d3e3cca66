"""Targets drawn from the model: the right distribution, and nobody else notices."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from checked import Checked, close, loss_of, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.curvature import Curvature, kfac_factors
from steepest.curvature.likelihoods import sampled_gradient

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOSSES = {
    "categorical": F.cross_entropy,
    "normal": lambda f, y: (f - y).square().sum(-1).mean() / 2,
    "bernoulli": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1).mean(),
}
TARGETS = {"categorical": torch.zeros(6, dtype=torch.long), "normal": torch.zeros(6, 3), "bernoulli": torch.ones(6, 3)}
DRAWS = 400


def average(draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean over draws, and its standard error."""
    stacked = torch.stack(draws)
    return stacked.mean(0), stacked.std(0) / len(draws) ** 0.5


def within(mean: Tensor, error: Tensor, wanted: Tensor) -> None:
    """All entries are within 4.5 standard errors: by chance that fails once in a thousand cases of 150 entries."""
    assert (mean - wanted).abs().le(4.5 * error + 1e-12).all()
    assert error.norm() < 0.1 * wanted.norm()  # a bias of half of the Fisher would be seen


@pytest.mark.parametrize("likelihood", LOSSES)
def test_sampled_statistics_are_unbiased(likelihood):
    """Many batches, each of 400 copies of the data, against the exact factors."""
    torch.manual_seed(0)
    model = mlp(dtype=torch.float64)
    exact = kfac_factors(
        model,
        [(X, TARGETS[likelihood].to(X) if likelihood != "categorical" else TARGETS[likelihood])],
        LOSSES[likelihood],
        fisher="type2",
    )
    curvature = Curvature(model, fisher="sampled")
    curvature.listening = True
    names = {layer.weight: layer.name for layer in curvature.layers}
    draws: dict[str, list[Tensor]] = {name: [] for name in exact}
    for _ in range(DRAWS):
        curvature.sample(model(X), likelihood)
        for weight, statistics in curvature.collect().items():
            close(statistics.A[0], exact[names[weight]].A)
            draws[names[weight]].append(statistics.B[0])
    for name, factors in exact.items():
        within(*average(draws[name]), factors.B)


@pytest.mark.parametrize("loss", ["entropy", "squares", "logistic"])
def test_sampled_factors_are_unbiased(loss):
    torch.manual_seed(1)
    model = mlp(dtype=torch.float64)
    function, y = {
        "entropy": (F.cross_entropy, torch.tensor([0, 1, -100, 2, 1, 0])),
        "squares": (nn.MSELoss(), torch.zeros(6, 3, dtype=torch.float64)),
        "logistic": (nn.BCEWithLogitsLoss(reduction="sum"), torch.full((6, 3), 0.3, dtype=torch.float64)),
    }[loss]
    exact = kfac_factors(model, [(X, y)], function, fisher="type2")
    draws = [kfac_factors(model, [(X, y)], function, fisher="sampled", seed=seed) for seed in range(DRAWS // 2)]
    for name, factors in exact.items():
        within(*average([draw[name].B for draw in draws]), factors.B)


@pytest.mark.parametrize("likelihood", LOSSES)
def test_gradients_of_draws(likelihood):
    """They are what autograd gives for drawn targets: p - y, mean 0."""
    f = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).expand(20000, 3)
    g = sampled_gradient(f, likelihood, torch.Generator().manual_seed(0))
    within_zero = g.mean(0).abs() / (g.std(0) / len(g) ** 0.5)
    assert (within_zero < 4.5).all()
    if likelihood == "categorical":
        y = f.softmax(-1) - g
        torch.testing.assert_close(y.sum(-1), torch.ones(len(f), dtype=f.dtype))
        assert (y.isclose(torch.ones(()).double()) | y.abs().lt(1e-12)).all()
    if likelihood == "bernoulli":
        y = f.sigmoid() - g
        assert (y.isclose(torch.ones(()).double()) | y.abs().lt(1e-12)).all()


def test_nothing_else_notices():
    model = mlp(dtype=torch.float64)
    other = copy.deepcopy(model)
    curvature = Checked(model, fisher="sampled")
    before = torch.get_rng_state()
    outputs = model(X)
    curvature.sample(outputs, "categorical")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    squares = outputs.square().sum(-1).mean()
    squares.backward()
    other(X).square().sum(-1).mean().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def sampled(model: nn.Module, times: int = 1, **options: int) -> list[Tensor]:
    curvature = Curvature(model, fisher="sampled", **options)
    curvature.listening = True
    found = []
    for _ in range(times):
        curvature.sample(model(X), "categorical")
        found.append(torch.cat([s.B.flatten() for s in curvature.collect().values()]))
    return found


def test_draws_repeat_and_differ():
    model = mlp(dtype=torch.float64)
    first, second = sampled(model, 2)
    torch.manual_seed(7)
    again = sampled(model, 2)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, *sampled(model, seed=1))
    assert not torch.equal(first, *sampled(model, rank=1))


def test_draws_go_on_where_they_were():
    """`samplings` is all that a checkpoint needs."""
    model = mlp(dtype=torch.float64)
    curvature = Curvature(model, fisher="sampled")
    curvature.listening = True
    curvature.samplings = 1
    curvature.sample(model(X), "categorical")
    found = torch.cat([s.B.flatten() for s in curvature.collect().values()])
    assert torch.equal(found, sampled(model, 2)[1])
    assert curvature.samplings == 2


def test_micro_batches_count_together():
    model = mlp(dtype=torch.float64)
    curvature = Curvature(model, fisher="sampled")
    curvature.listening = True
    for part in X.chunk(2):
        outputs = model(part)
        curvature.sample(outputs, "normal")
        outputs.sum().backward()
    last = curvature.collect()[model[4].weight]
    torch.testing.assert_close(last.A[0, -1, -1], torch.ones(()).double())
    noise = [sampled_gradient_of(curvature, number) for number in range(2)]
    rows = torch.cat(noise)
    close(last.B[0], rows.T @ rows / 6)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_terms_are_rows_of_outputs_not_of_inputs():
    """Five tokens of a sample share one loss term."""
    model = nn.Sequential(nn.Linear(4, 2), Mean(), nn.Linear(2, 3)).double()
    curvature = Curvature(model, fisher="sampled")
    curvature.listening = True
    curvature.sample(model(X[:3, None].expand(3, 5, 4)), "normal")
    deltas = sampled_gradient_of(curvature, 0) @ model[2].weight.detach() / 5
    close(curvature.collect()[model[0].weight].B[0], 5 * deltas.T @ deltas / 3)


def sampled_gradient_of(curvature: Curvature, number: int) -> Tensor:
    import random

    seed = random.Random(f"{curvature.seed}/{number}/{curvature.rank}").getrandbits(63)
    return sampled_gradient(torch.zeros(3, 3).double(), "normal", torch.Generator().manual_seed(seed))


def test_it_does_nothing_unless_statistics_are_due():
    model = mlp(dtype=torch.float64)
    for options, listening in (({"fisher": "empirical"}, True), ({"fisher": "sampled"}, False)):
        curvature = Checked(model, **options)
        curvature.listening = listening
        curvature.sample(model(X), "categorical")
        assert curvature.calls == {}
        assert curvature.samplings == 0
        curvature.detach()
    curvature = Checked(model, fisher="sampled")
    with torch.no_grad():
        curvature.sample(model(X), "categorical")
    curvature.sample(model.eval()(X), "categorical")
    assert curvature.calls == {}
    with pytest.raises(ValueError, match="likelihood='poisson': must be one of 'categorical', 'normal', 'bernoulli'"):
        curvature.sample(model(X), "poisson")


def test_autocast_outputs():
    model = mlp()
    curvature = Checked(model, fisher="sampled")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(X.float())
        assert outputs.dtype == torch.bfloat16
        curvature.sample(outputs, "categorical")
        loss_of(outputs).backward()
    assert set(curvature.calls.values()) == {1}
    assert all(s.B.isfinite().all() for s in curvature.collect().values())


@pytest.fixture
def alone():
    """A process group of one rank."""
    os.environ |= {"MASTER_ADDR": "localhost"}
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_reducer_of_ddp_does_not_notice(alone):
    model = mlp(dtype=torch.float64)
    curvature = Checked(model, fisher="sampled")
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.zero_grad()
        outputs = wrapped(X)
        curvature.sample(outputs, "categorical")
        outputs.square().sum(-1).mean().backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain(X).square().sum(-1).mean().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert set(curvature.calls.values()) == {2}
