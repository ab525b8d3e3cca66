"""Stochastic rounding is unbiased, exact where it can be, and repeats whenever the step is the same."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import steepest
from steepest.linalg import attempts
from steepest.linalg.rounding import mixed, positions, round_stochastically, rounding_key

BFLOAT16 = torch.finfo(torch.bfloat16)


def key(step=1.0, name="weight", seed=0):
    return rounding_key(name, seed, torch.tensor(step))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("base", [1.0, -3.0, 1e-30])
def test_the_mean_is_exact(fraction, base):
    """The mean over 100 draws for each of 10,000 entries is exact to 1e-3 of the gap between neighbours."""
    low = torch.tensor(base).bfloat16().float()
    high = torch.nextafter(low.bfloat16(), torch.tensor(math.copysign(math.inf, base), dtype=torch.bfloat16)).float()
    x = (low + fraction * (high - low)).expand(10_000).clone()
    index = torch.arange(10_000)
    draws = torch.stack([round_stochastically(x, index, key(float(t))) for t in range(100)]).double()
    assert set(draws.unique().tolist()) <= {low.item(), high.item()}
    gap = (high - low).abs().item()
    error = ((draws.mean() - x[0].double()) / gap).abs()
    assert error < 1e-3 + 3 * math.sqrt(fraction * (1 - fraction) / 1e6)
    for means in (draws.mean(0), draws.mean(1)):  # neither entries nor steps are biased
        spread = ((means - draws.mean()) / gap).std().item()
        expected = math.sqrt(fraction * (1 - fraction) / (draws.numel() / len(means)))
        assert abs(spread - expected) <= 0.2 * expected + 1e-12


def test_bfloat16_numbers_stay():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()  # every bfloat16
    rounded = round_stochastically(x, torch.arange(len(x)), key())
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(rounded[~x.isnan()], x[~x.isnan()])
    assert torch.equal(rounded[~x.isnan()].signbit(), x[~x.isnan()].signbit())


def test_the_ends_of_the_range():
    """Finite numbers stay finite, although float32 has larger ones than bfloat16; NaN of any bits stays NaN."""
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, math.inf, -math.inf])
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    for t in range(20):
        rounded = round_stochastically(x, torch.arange(4), key(float(t)))
        assert rounded.tolist() == [BFLOAT16.max, -BFLOAT16.max, math.inf, -math.inf]
        assert round_stochastically(nans, torch.arange(4), key(float(t))).isnan().all()
    tiny = torch.full((1000,), 2.0**-149)  # rounds to zero, and rarely to the least number of bfloat16
    assert set(round_stochastically(tiny, torch.arange(1000), key()).tolist()) <= {0.0, 2.0**-133}


def test_noise_differs_by_place_name_seed_and_step():
    x = torch.full((4096,), 1 + 2**-8)
    index = torch.arange(4096)
    variants = [key(), key(2.0), key(name="bias"), key(seed=1)]
    drawn = [round_stochastically(x, index, k) > 1 for k in variants]
    drawn += [round_stochastically(x, index + shift, key()) > 1 for shift in (1, 4096, 2**32, 2**40)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs((a == b).float().mean().item() - 0.5) < 0.05


def test_the_hash_is_the_published_one():
    def lowbias32(x):
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 0xFFFFFFFF, 0x80000000, 123456789]
    assert mixed(torch.tensor(numbers)).tolist() == [lowbias32(x) for x in numbers]


def test_a_part_is_rounded_as_in_the_whole():
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    whole = round_stochastically(x, torch.arange(120).view(6, 5, 4), key())
    ghost = torch.empty(6, 5, 4, device="meta")
    for part in (lambda y: y[2:4], lambda y: y[:, 1:3], lambda y: y.view(6, 20)[1:, 3:7], lambda y: y.mT[..., 1]):
        assert torch.equal(round_stochastically(part(x), positions(part(ghost)), key()), part(whole))
    assert positions(torch.empty((), device="meta")) == 0


# In the optimizer.

RULES = {"soap": {}, "muon": {}, "adamw": {}, "lion": {}, "soap blocks": {"block_size": 3}}
SHAPES = {"a": (4, 6), "b": (4, 6), "kernel": (2, 3, 2), "bias": (5,), "gain": ()}


def start(name, order=tuple(SHAPES), names=True, **options):
    params = {
        n: nn.Parameter(torch.linspace(-1, 1, max(1, math.prod(SHAPES[n]))).view(SHAPES[n]).bfloat16()) for n in order
    }
    given = list(params.items()) if names else list(params.values())
    options = {"lr": 1e-2, "stochastic_rounding": True} | RULES[name] | options
    return params, steepest.Optimizer(given, name.split()[0], **options)


def train(params, optimizer, steps):
    for t in steps:
        for n, p in params.items():
            seed = 100 * t + list(SHAPES).index(n)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        optimizer.step()


def same(ours, theirs):
    return all(torch.equal(p, theirs[n]) for n, p in ours.items())


@pytest.mark.parametrize("name", RULES)
def test_it_repeats_resumes_and_leaves_the_generator_alone(name):
    before = torch.get_rng_state()
    straight, optimizer = start(name)
    train(straight, optimizer, range(6))
    first, optimizer = start(name)
    train(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second, optimizer = start(name, order=tuple(reversed(SHAPES)), stochastic_rounding=False)
    with torch.no_grad():
        for n, p in second.items():
            p.copy_(first[n])
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(second, optimizer, range(3, 6))
    assert same(straight, second), "the numbers come from names and steps, which the state brings"
    assert torch.equal(torch.get_rng_state(), before)

    nearest, optimizer = start(name, stochastic_rounding=False)
    train(nearest, optimizer, range(6))
    seeded, optimizer = start(name, rounding_seed=1)
    train(seeded, optimizer, range(6))
    assert not same(straight, nearest)
    assert not same(straight, seeded)


@pytest.mark.parametrize("name", ["soap", "adamw"])
def test_the_path_of_accelerators(name, monkeypatch):
    """On accelerators bad gradients are masked, and the weights that they must not change are written unchanged."""

    def run():
        params, optimizer = start(name)
        for t in range(4):
            train(params, optimizer, [t])
            before = params["a"].detach().clone()
            for n, p in params.items():
                p.grad = torch.full_like(p, torch.nan) if n == "a" else p.grad
            optimizer.step()
            assert torch.equal(params["a"], before)
        return params

    expected = run()
    monkeypatch.setattr(attempts, "at_hand", lambda x: False)
    assert same(run(), expected)


def test_without_names_positions_count():
    params, optimizer = start("soap", names=False)
    train(params, optimizer, range(3))
    again, optimizer = start("soap", names=False)
    train(again, optimizer, range(3))
    twins, _ = start("soap", names=False)
    twins["b"] = twins["a"]
    assert same(params, again)
    W, V = nn.Parameter(torch.ones(64, 64).bfloat16()), nn.Parameter(torch.ones(64, 64).bfloat16())
    opt = steepest.Optimizer([{"params": [W]}, {"params": [V]}], "adamw", lr=1e-3, stochastic_rounding=True)
    W.grad = V.grad = torch.ones(64, 64).bfloat16()
    opt.step()
    assert not torch.equal(W, V)


def test_blocks_know_their_places():
    """Blocks of a matrix that have the same weights, gradients and steps are rounded differently."""
    W = nn.Parameter(torch.ones(16, 32).bfloat16())
    opt = steepest.Optimizer([W], "soap", lr=1e-3, block_size=16, stochastic_rounding=True)
    W.grad = torch.eye(16).repeat(1, 2).bfloat16()
    opt.step()
    left, right = W.detach().chunk(2, dim=1)
    assert not torch.equal(left, right)


@pytest.mark.parametrize("rule", ["muon", "adamw", "lion", "soap"])
def test_small_steps_count_on_average(rule):
    """A hundred steps of a hundredth of the gap get lost by nearest rounding, and arrive within a tenth by this."""
    moved = {}
    for stochastic in (False, True):
        W = nn.Parameter(torch.ones(50, 50).bfloat16())
        options = {"scale": "none"} if rule == "muon" else {}
        lr = 2**-8 / 100  # below 1, neighbours are 2⁻⁸ apart
        opt = steepest.Optimizer([W], rule, lr=lr, weight_decay=0.0, stochastic_rounding=stochastic, **options)
        master = nn.Parameter(torch.ones(50, 50))
        exact = steepest.Optimizer([master], rule, lr=lr, weight_decay=0.0, **options)
        for t in range(100):
            W.grad = (torch.eye(50) * (1 + t % 2)).bfloat16() if rule == "muon" else torch.ones(50, 50).bfloat16()
            master.grad = W.grad.float()
            opt.step()
            exact.step()
        moved[stochastic] = (W.float() - 1).sum().item() / (master.detach() - 1).sum().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(1, abs=0.2 if rule in ("muon", "soap") else 0.05)


def test_other_dtypes_are_left_alone():
    """The option may be set for mixed models, because float32 weights train as without it."""
    results = []
    for stochastic in (False, True):
        W, b = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3).half())
        opt = steepest.SOAP([W, b], lr=0.1, stochastic_rounding=stochastic)
        W.grad, b.grad = torch.eye(3, 4), torch.ones(3).half()
        opt.step()
        results.append((W.detach(), b.detach()))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_copy_goes_on_alike():
    params, optimizer = start("soap")
    train(params, optimizer, range(2))
    others, other = copy.deepcopy((params, optimizer))
    train(params, optimizer, range(2, 4))
    train(others, other, range(2, 4))
    assert same(params, others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stochastic_rounding": 1}, "stochastic_rounding=1: must be a bool"),
        ({"rounding_seed": 0.5}, "rounding_seed=0.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        steepest.Optimizer([nn.Parameter(torch.ones(2, 2))], "soap", lr=0.1, **options)


def test_a_whole_model_is_rounded():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    optimizer = steepest.for_model(model, "soap", lr=1e-3, stochastic_rounding=True)
    assert [group["stochastic_rounding"] for group in optimizer.param_groups] == [True] * len(optimizer.param_groups)
