import pytest
import torch

from steepest.engine.optimizer import Optimizer
from steepest.linalg.polar import polar_factor
from steepest.linalg.roots import matrix_power
from steepest.rule import Step
from steepest.rules.kl_shampoo import KLShampoo
from steepest.rules.muon import Muon
from steepest.rules.shampoo import Shampoo

ABSOLUTE = {"eps": 1e-6, "relative_eps": False, "solver": "eigh", "weight_decay": 0.0, "graft": "none"}
AVERAGED = ABSOLUTE | {"betas": (0.9, 0.95), "shampoo_beta": 0.95}
CASES = {
    "adagrad_sum": ABSOLUTE | {"betas": (0.0, 0.95), "shampoo_beta": 1.0},
    "ema": AVERAGED | {"weight_decay": 0.01},
    "ema_adamgraft": AVERAGED | {"graft": "adam"},
    "ema_half": AVERAGED | {"exponent": -0.5},
}
SOAP = {
    "noise_floor": 0.0,
    "momentum_floor": False,
    "solver": "eigh",
    "precondition_frequency": 1,
    "match_columns": False,
    "weight_decay": 0.0,
}


def step(rule, G, state=None, t=1):
    state = rule.init(G) if state is None else state
    stage = "first" if t == 1 else "steady"
    return rule.update(G, state, Step(torch.full((len(G), 1, 1), t, dtype=G.dtype), stage, slice(None))), state


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(3, 2), (5, 4)])
def test_the_authors_steps(golden, trajectory, name, shape):
    case = golden("shampoo")
    expected = torch.tensor(case[f"{name}_5x4"] if shape == (5, 4) else case[name]["params"])
    weights, _ = trajectory(lambda params: Optimizer(params, "shampoo", lr=0.01, **CASES[name]), *shape, len(expected))
    torch.testing.assert_close(torch.stack(weights), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 2), (5, 4)])
def test_with_corrected_eigenvalues_it_is_soap(golden, trajectory, shape):
    """They agree after the first step, in which both divide rounding errors by rounding errors off the diagonal."""
    case = golden("shampoo")
    expected = torch.tensor(case["ev_corrected_5x4"] if shape == (5, 4) else case["ev_corrected"]["params"])
    weights, _ = trajectory(
        lambda params: Optimizer(params, "soap", lr=0.01, betas=(0.9, 0.95), **SOAP), *shape, len(expected)
    )
    torch.testing.assert_close(torch.stack(weights).diff(dim=0), expected.diff(dim=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 4, 9), (1, 9, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {"shampoo_beta": 1.0},
        {"shampoo_beta": 0.95},
        {"exponent": None, "max_precond_dim": 6},  # one factor, exponent -1/2
        {"betas": (0.5, 0.95)},
    ],
)
def test_one_step_from_zero_is_the_polar_factor(shape, options):
    G = random(*shape)
    D, _ = step(Shampoo(eps=0.0, graft="none", **options), G)
    torch.testing.assert_close(D, polar_factor(G, "exact"), rtol=0, atol=1e-5)
    D, _ = step(Shampoo(eps=1e-14, graft="none", **options), G)
    torch.testing.assert_close(D, polar_factor(G, "exact"), rtol=0, atol=1e-5)
    torch.testing.assert_close(step(Muon(momentum=0.0, ns="exact", scale="none"), G)[0], D, rtol=0, atol=1e-5)


def test_averages_and_roots_by_their_formula():
    rule = Shampoo(betas=(0.0, 0.9), shampoo_beta=0.8, eps=1e-3, relative_eps=False, graft="none", solver="eigh")
    L, R = torch.zeros(1, 4, 4, dtype=torch.float64), torch.zeros(1, 6, 6, dtype=torch.float64)
    state = rule.init(random(1, 4, 6))
    for t in range(1, 5):
        G = random(1, 4, 6, seed=t)
        L, R = 0.8 * L + 0.2 * G @ G.mT, 0.8 * R + 0.2 * G.mT @ G
        roots = [matrix_power(K / (1 - 0.8**t), -0.25, eps=1e-3) for K in (L, R)]
        D, _ = step(rule, G, state, t)
        torch.testing.assert_close(D, roots[0] @ G @ roots[1])


def test_kl_shampoo_by_its_formula():
    floor, eps = 1e-3, 1e-9
    rule = KLShampoo(betas=(0.0, 0.9), kl_floor=floor, eps=eps, graft="none", solver="eigh")
    G = random(1, 5, 5)
    L, R = G @ G.mT / (5 * G.square().mean().sqrt()), G.mT @ G / (5 * G.square().mean().sqrt())
    state = rule.init(G)
    step(rule, G, state)
    for t in range(2, 5):
        G = random(1, 5, 5, seed=t)
        beta = 1 - 0.05 / (1 - 0.95**t)
        whitened = [_floored_inverse(K, floor) for K in (L, R)]
        L = beta * L + (1 - beta) * G @ whitened[1] @ G.mT / 5
        R = beta * R + (1 - beta) * G.mT @ whitened[0] @ G / 5
        D, _ = step(rule, G, state, t)
        expected = matrix_power(L, -0.5, eps=eps, relative=True) @ G @ matrix_power(R, -0.5, eps=eps, relative=True)
        torch.testing.assert_close(D, expected, rtol=1e-5, atol=1e-8)


def l2_trajectory(rule, W, grads, wd, **options):
    """Weights after each step of the engine, lr being 0.01."""
    W, moved = torch.nn.Parameter(W.clone()), []
    optimizer = Optimizer([W], rule, lr=0.01, weight_decay=wd, weight_decay_method="l2", **options)
    for G in grads:
        W.grad = G.clone()
        optimizer.step()
        moved.append(W.detach().clone())
    return torch.stack(moved)


@pytest.mark.parametrize("rule", ["shampoo", "kl_shampoo"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 5)])
def test_l2_is_a_part_of_the_gradient_for_covariances_too(rule, shape):
    """The naive equations with G + wd W for G, in every place: covariances, momentum and grafted norm."""
    wd, lr, floor, eps, (beta1, beta2, beta) = 0.3, 0.01, 1e-3, 1e-6, (0.9, 0.95, 0.95)
    kl, (m, n) = rule == "kl_shampoo", shape
    power, options = (-0.5, {"kl_floor": floor}) if kl else (-0.25, {})
    grads = [random(*shape, seed=t) for t in range(1, 7)]
    W = random(*shape, seed=7)
    moved = l2_trajectory(rule, W, grads, wd, betas=(beta1, beta2), eps=eps, graft="adam", solver="eigh", **options)
    L, R = torch.zeros(m, m, dtype=W.dtype), torch.zeros(n, n, dtype=W.dtype)
    M = v = torch.zeros_like(W)
    for t, (G, ours) in enumerate(zip(grads, moved, strict=True), start=1):
        G = G + wd * W
        one_minus_beta = (1 - beta) / (1 - beta**t)
        left, right = G @ G.T, G.T @ G
        if kl:
            rms = G.square().mean().sqrt()
            left = G @ (_floored_inverse(R, floor) if t > 1 else torch.eye(n, dtype=W.dtype) / rms) @ G.T / n
            right = G.T @ (_floored_inverse(L, floor) if t > 1 else torch.eye(m, dtype=W.dtype) / rms) @ G / m
        L, R = L + one_minus_beta * (left - L), R + one_minus_beta * (right - R)
        M, v = beta1 * M + (1 - beta1) * G, beta2 * v + (1 - beta2) * G**2
        mean = M / (1 - beta1**t)
        roots = [matrix_power(K, power, eps=eps, relative=True) for K in (L, R)]
        D = roots[0] @ mean @ roots[1]
        length = (mean / ((v / (1 - beta2**t)).sqrt() + 1e-8)).norm()
        W = W - lr * length * D / D.norm()
        torch.testing.assert_close(ours, W, rtol=0, atol=1e-9)


@pytest.mark.parametrize("graft", ["none", "sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("shampoo_beta", [0.95, 1.0])
@pytest.mark.parametrize("rule", ["shampoo", "kl_shampoo"])
def test_l2_decays_where_the_gradient_is_zero(rule, shampoo_beta, graft):
    W = random(6, 4)
    moved = l2_trajectory(rule, W, [torch.zeros_like(W)] * 3, 0.5, shampoo_beta=shampoo_beta, graft=graft)
    assert moved[0].norm() < 0.999 * W.norm()
    assert moved[2].norm() < moved[1].norm() < moved[0].norm()


def _floored_inverse(K, floor):
    eigenvalues, Q = torch.linalg.eigh(K)
    floored = eigenvalues.clamp(min=floor * eigenvalues.amax().item())
    return Q @ torch.diag_embed(1 / floored) @ Q.mT


@pytest.mark.parametrize("kind", [Shampoo, KLShampoo])
def test_directions_do_not_depend_on_the_gradients_unit(kind):
    rule = kind(graft="none", solver="eigh")
    states = [rule.init(random(2, 4, 7)) for _ in range(2)]
    for t in range(1, 6):
        G = random(2, 4, 7, seed=t)
        plain, large = (step(rule, scale * G, state, t)[0] for scale, state in zip((1, 1e4), states, strict=True))
        torch.testing.assert_close(large, plain)


@pytest.mark.parametrize("graft", ["sgd", "adam", "rmsprop"])
def test_grafting_changes_the_norm_and_nothing_else(graft):
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    rules = [Shampoo(betas=(beta1, beta2), graft=name) for name in (graft, "none")]
    states = [rule.init(random(2, 4, 4)) for rule in rules]
    M = v = torch.zeros(2, 4, 4, dtype=torch.float64)
    for t in range(1, 4):
        G = random(2, 4, 4, seed=t)
        M, v = beta1 * M + (1 - beta1) * G, beta2 * v + (1 - beta2) * G**2
        mean = M / (1 - beta1**t)
        other = {
            "sgd": mean,
            "adam": mean / ((v / (1 - beta2**t)).sqrt() + eps),
            "rmsprop": mean / (v.sqrt() + eps),
        }[graft]
        grafted, plain = (step(rule, G, state, t)[0] for rule, state in zip(rules, states, strict=True))
        norm, plain_norm, expected = (x.norm(dim=(1, 2), keepdim=True) for x in (grafted, plain, other))
        torch.testing.assert_close(norm, expected)
        torch.testing.assert_close(grafted / norm, plain / plain_norm)


def test_between_refreshes_eigenvalues_are_fresh():
    """A gradient in a direction unseen at the last refresh is damped by its own size, not lifted by 1/eps."""
    rule = Shampoo(betas=(0.0, 0.9), shampoo_beta=0.5, eps=1e-12, graft="none", precondition_frequency=10)
    first, second = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    first[0, 0, 0] = second[0, 1, 1] = 1.0
    _, state = step(rule, first)
    D = rule.update(second, state, Step(torch.full((1, 1, 1), 2.0, dtype=torch.float64)))
    assert D.abs().max() < 2
