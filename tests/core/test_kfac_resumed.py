"""K-FAC goes on bit for bit where it was, from checkpoints, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import steepest

STEPS = 10
Pair = tuple[nn.Module, torch.optim.Optimizer]


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3))


def train(pair: Pair, numbers: range) -> None:
    model, opt = pair
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 3, generator=generator)
        opt.zero_grad()
        outputs = model(x)
        opt.sample(outputs, "normal")
        (outputs - y).square().sum(-1).mean().backward()
        opt.step()


def everything(pair: Pair) -> list[Tensor]:
    model, opt = pair
    states = [opt.state[p] for p in model.parameters()]
    return [*model.parameters(), *(state[name] for state in states for name in sorted(state))]


def state_dict(pair: Pair, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Pair:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in pair], file)
    file.seek(0)
    fresh = mlp(seed=1)
    other = fresh, make(fresh)
    for part, state in zip(other, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    return other


def saved(pair: Pair, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Pair:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "state_dict": state_dict,
    "deepcopy": lambda pair, make: copy.deepcopy(pair),
    "pickle": lambda pair, make: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved,
}


QUICK = {
    *((steepest.KFAC, "sampled", "state_dict"), (steepest.EKFAC, "sampled", "state_dict")),
    *((steepest.KFAC, "empirical", "deepcopy"), (steepest.KFAC, "sampled", "pickle")),
    (steepest.EKFAC, "empirical", "torch.save"),
}


@pytest.mark.parametrize(
    ("make", "fisher", "way"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product((steepest.KFAC, steepest.EKFAC), ("empirical", "sampled"), WAYS)
    ],
)
def test_going_on_at_every_phase(make, fisher, way):
    """Statistics at every third step and bases at every seventh, and at all of the first four."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return make(model, fisher=fisher, statistics_frequency=3, precondition_frequency=7, settle=4)

    model = mlp()
    pair = model, optimizer(model)
    stages = []
    for number in range(STEPS):
        stages.append(WAYS[way](pair, optimizer))
        train(pair, range(number, number + 1))
    for number, other in enumerate(stages):
        train(other, range(number, STEPS))
        for x, y in zip(everything(pair), everything(other), strict=True):
            assert torch.equal(x, y), f"resumed at {number}"


def test_a_copy_is_apart():
    """The copy's hooks are on the copy's model, and neither hears the other."""
    model = mlp()
    pair = model, steepest.KFAC(model)
    train(pair, range(2))
    copied = copy.deepcopy(pair)
    before = [x.clone() for x in everything(pair)]
    train(copied, range(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(before, everything(pair), strict=True))
    train(pair, range(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(everything(pair), everything(copied), strict=True))


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own(copies):
    model = mlp()
    opt = steepest.KFAC(model)
    train((model, opt), range(2))
    other = copies(opt)
    mine = {p for group in opt.param_groups for p in group["params"]}
    theirs = {p for group in other.param_groups for p in group["params"]}
    assert mine.isdisjoint(theirs)
    assert theirs == set(other._model.parameters())
    train((other._model, other), range(2, 3))
    train((model, opt), range(2, 3))
    for p, q in zip(model.parameters(), other._model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_detached_optimizer_stays_detached():
    model = mlp()
    pair = model, steepest.KFAC(model)
    train(pair, range(2))
    pair[1].detach()
    other = copy.deepcopy(pair)
    assert not other[1].wants_statistics
    train(other, range(2, 3))
    train(pair, range(2, 3))
    assert all(torch.equal(x, y) for x, y in zip(everything(pair), everything(other), strict=True))
