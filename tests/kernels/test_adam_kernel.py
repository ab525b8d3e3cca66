"""The fused pass over Adam's moments against its twin in float64."""

import itertools

import pytest
import torch
from long import pairs

import steepest
from steepest.kernels import use
from steepest.rules.parts.moments import adam

SWITCHES = ("correct_bias", "nesterov", "momentum_floor")
QUIET = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
OPTIONS = [
    dict(zip(SWITCHES, values, strict=True), noise_floor=noise)
    for noise, *values in itertools.product((0.0, 0.1), *[(False, True)] * 3)
]


def start(normal, *shape):
    return {"exp_avg": normal(*shape, seed=1), "exp_avg_sq": normal(*shape, seed=2).square()}


def double(state):
    return {name: x.double() for name, x in state.items()}


def check(launched, g, state, t, betas=(0.9, 0.999), eps=1e-8, **options):
    """One step by the kernels, compared with one in float64."""
    expected_state = double(state)
    expected = adam(g.double(), expected_state, t.double(), betas, eps, **options)
    with use("always"):
        direction = adam(g, state, t, betas, eps, **options)
    assert launched.pop() == "adam"
    scale = expected.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(direction.double() / scale, expected / scale, rtol=2e-5, atol=1e-6)
    for name, x in state.items():
        torch.testing.assert_close(x.double(), expected_state[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_combination(launched, normal, options):
    t = torch.tensor([1.0, 2.0, 5000.0], device=normal(1).device).view(3, 1, 1)
    check(launched, normal(3, 40, 61), start(normal, 3, 40, 61), t, **options)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (2, 64, 32), (2, 32, 64 + 1)])
@pytest.mark.parametrize("noise_floor", [0.0, 0.1])
def test_every_size(launched, normal, monkeypatch, shape, noise_floor):
    """With small blocks and few parts, a program has several blocks, the last ones with nothing or little in them."""
    from steepest.kernels import adam as module

    monkeypatch.setattr(module, "BLOCK", 128)
    monkeypatch.setattr(module, "PARTS", 4)
    t = torch.full((shape[0], 1, 1), 3.0, device=normal(1).device)
    check(launched, normal(*shape), start(normal, *shape), t, momentum_floor=True, noise_floor=noise_floor)


@pytest.mark.parametrize(
    ("betas", "eps", "nesterov", "correct_bias"),
    pairs([(0.0, 0.0), (0, 0.5), (0.3, 0.99)], [1e-3, 0], [False, True], [False, True]),
    ids=str,
)
def test_coefficients(launched, normal, betas, eps, nesterov, correct_bias):
    t = torch.tensor([1.0, 4.0], device=normal(1).device).view(2, 1, 1)
    options = {"nesterov": nesterov, "correct_bias": correct_bias, "noise_floor": 0.01}
    check(launched, normal(2, 9, 7), start(normal, 2, 9, 7), t, betas, eps, **options)


def test_a_transposed_gradient_and_slots_of_a_stack(launched, normal):
    stack = start(normal, 4, 9, 7)
    window = {name: x[1:3] for name, x in stack.items()}
    before = {name: x.clone() for name, x in stack.items()}
    t = torch.tensor([2.0, 3.0], device=normal(1).device).view(2, 1, 1)
    check(launched, normal(2, 7, 9).mT, window, t, noise_floor=0.1)
    for name, x in stack.items():
        assert torch.equal(x[[0, 3]], before[name][[0, 3]])
        assert not torch.equal(x[1:3], before[name][1:3])


@QUIET
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("noise_floor", [0.0, 0.1])
def test_a_bad_matrix_stays_alone_and_does_not_look_good(launched, normal, bad, noise_floor):
    g, state, t = normal(3, 9, 7), start(normal, 3, 9, 7), torch.ones(3, 1, 1, device=normal(1).device)
    g[1, 2, 3] = bad
    pair = {name: x[[0, 2]] for name, x in state.items()}
    options = {"momentum_floor": True, "noise_floor": noise_floor}
    with use("always"):
        D = adam(g, state, t, (0.9, 0.999), 1e-8, **options)
        good = adam(g[[0, 2]], pair, t[:2], (0.9, 0.999), 1e-8, **options)
    assert torch.equal(D[[0, 2]], good)
    assert all(torch.equal(state[name][[0, 2]], pair[name]) for name in pair)
    assert D[1, 2, 3].isnan()


@QUIET
def test_a_bad_second_moment_shows_through_the_momentum_floor(launched, normal):
    state = start(normal, 1, 9, 7)
    state["exp_avg_sq"][0, 2, 3] = torch.nan
    with use("always"):
        D = adam(
            normal(1, 9, 7),
            state,
            torch.ones(1, 1, 1, device=normal(1).device),
            (0.9, 0.999),
            1e-8,
            momentum_floor=True,
        )
    assert D[0, 2, 3].isnan()
    assert D.isnan().sum() == 1


def test_zero_gives_zero_and_small_numbers_count(launched, normal):
    g, t = torch.zeros_like(normal(2, 9, 7)), torch.ones(2, 1, 1, device=normal(1).device)
    g[1] = 1e-16
    state = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
    with use("always"):
        D = adam(g, state, t, (0.9, 0.999), 0.0, momentum_floor=True, noise_floor=0.01)
    assert not D[0].any()
    torch.testing.assert_close(D[1], torch.full_like(D[1], 1 / (1 + 1e-4)), rtol=1e-5, atol=0)


def test_bits_are_the_same_alone_in_a_batch_and_again(launched, normal, monkeypatch):
    from steepest.kernels import adam as module

    monkeypatch.setattr(module, "BLOCK", 128)
    g, state = normal(3, 30, 31), start(normal, 3, 30, 31)
    t = torch.tensor([1.0, 2.0, 3.0], device=normal(1).device).view(3, 1, 1)

    def step(slots):
        own = {name: x[slots].clone() for name, x in state.items()}
        with use("always"):
            return adam(g[slots], own, t[slots], (0.9, 0.999), 1e-8, noise_floor=0.1)

    together = step(slice(None))
    assert torch.equal(together, step(slice(None)))
    assert torch.equal(together, torch.cat([step(slice(i, i + 1)) for i in range(3)]))


@pytest.mark.parametrize("name", ["soap", "muon", "moso", "shampoo"])
def test_three_steps_of_an_optimizer(launched, normal, name):
    """Of square matrices: in a null space a basis follows rounding, and the twin is as far from itself."""

    def weights(mode, dtype):
        W = torch.nn.Parameter(normal(24, 24, seed=7, dtype=dtype))
        optimizer = steepest.create(name, [W], lr=0.1)
        for seed in range(3):
            W.grad = normal(24, 24, seed=seed, dtype=dtype)
            with use(mode):
                optimizer.step()
        return W.detach().double()

    exact = weights("never", torch.float64)
    allowed = (weights("never", torch.float32) - exact).norm()
    assert not launched
    assert (weights("always", torch.float32) - exact).norm() < 4 * allowed
    assert launched


@pytest.mark.parametrize("mode", ["always", "never"])
def test_moments_of_lost_gradients_stay(launched, normal, mode):
    g, state, t = normal(3, 8, 9), start(normal, 3, 8, 9), torch.full((3, 1, 1), 2.0, device=normal(1).device)
    lost = torch.tensor([0.0, 1.0, 0.0], device=t.device).view(3, 1, 1)
    g[1] = 0
    before = {name: x.clone() for name, x in state.items()}
    with use(mode):
        adam(g, state, t, (0.9, 0.99), 1e-8, lost=lost)
    assert ("adam" in launched) == (mode == "always")
    for name, x in state.items():
        assert torch.equal(x[1], before[name][1])
        assert not torch.equal(x[0], before[name][0])
        assert not torch.equal(x[2], before[name][2])
