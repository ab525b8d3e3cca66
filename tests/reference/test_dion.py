import pytest
import torch

from steepest.engine.optimizer import Optimizer
from steepest.linalg.orthonormal import qr, rcqr
from steepest.linalg.polar import polar_factor
from steepest.rule import Step, whole
from steepest.rules.dion import Dion

CASES = {  # rows, columns, rank
    "simple_3x2_r1": (3, 2, 1),
    "simple_5x4_r2": (5, 4, 2),
    "simple_6x4_r4": (6, 4, 4),
    "reference_5x4_r2_transposeFalse": (5, 4, 2),
    "reference_4x6_r2_transposeTrue": (4, 6, 2),
}


def step(rule, G, state=None):
    state = rule.init(G) if state is None else state
    return whole(rule.update(G, state, Step(torch.ones(len(G), 1, 1)))), state


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_three_steps(golden, matrix, trajectory, name):
    m, n, r = CASES[name]

    def make(params):
        optimizer = Optimizer(
            params, "dion", lr=0.01, weight_decay=0.01, rank_fraction=r / min(m, n), scale="mup", orthonormalize="qr"
        )
        optimizer.state[params[0]]["Q"].copy_(matrix(min(m, n), r, 7))
        return optimizer

    for steps, expected in enumerate(golden("dion")[name], start=1):
        weights, state = trajectory(make, m, n, steps, torch.float64)
        for x, key in ((weights[-1], "X"), (state["momentum_buffer"], "M"), (state["Q"], "Q")):
            torch.testing.assert_close(x, torch.tensor(expected[key], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)])
def test_both_ways_to_orthonormalize_take_the_same_steps(shape):
    rules = [Dion(rank_fraction=0.5, orthonormalize=name) for name in ("qr", "rcqr")]
    states = [rule.init(torch.zeros(2, *shape, dtype=torch.float64)) for rule in rules]
    for seed in range(4):
        G = random(2, *shape, seed=seed)
        first, second = (step(rule, G, state)[0] for rule, state in zip(rules, states, strict=True))
        torch.testing.assert_close(second, first, rtol=0, atol=1e-9)
    torch.testing.assert_close(states[1]["momentum_buffer"], states[0]["momentum_buffer"], rtol=0, atol=1e-9)


def test_a_gradient_of_low_rank_is_followed_to_its_polar_factor():
    G = random(2, 12, 3) @ random(2, 3, 8, seed=1)
    rule = Dion(rank_fraction=0.5, momentum=0.0, scale="none")
    state = rule.init(G)
    for _ in range(60):
        D, _ = step(rule, G, state)
        state["momentum_buffer"].zero_()
    torch.testing.assert_close(D, polar_factor(G, "exact"), rtol=0, atol=1e-8)


def test_at_full_rank_one_step_takes_the_whole_gradient():
    G = random(1, 6, 4)
    rule = Dion(rank_fraction=1.0, momentum=0.0, orthonormalize="qr")
    _, state = step(rule, G)
    torch.testing.assert_close(state["momentum_buffer"], torch.zeros_like(G), rtol=0, atol=1e-12)


def test_what_is_not_applied_is_kept():
    G = random(1, 9, 6)
    rule = Dion(rank_fraction=0.3, momentum=0.9, scale="none")
    D, state = step(rule, G)
    P, _, _ = torch.linalg.svd(D)
    applied, kept = P[..., :2], P[..., 2:]
    M = state["momentum_buffer"]
    torch.testing.assert_close(applied.mT @ M, 0.9 * applied.mT @ G)
    torch.testing.assert_close(kept.mT @ M, kept.mT @ G)


@pytest.mark.parametrize("orthonormalize", ["qr", "rcqr"])
def test_beyond_the_rank_of_the_momentum_nothing_moves(orthonormalize):
    G = random(1, 60, 1) @ random(1, 1, 30, seed=1)
    rule = Dion(rank_fraction=0.5, scale="none", orthonormalize=orthonormalize)
    state = rule.init(G)
    before = state["Q"].clone()
    D, _ = step(rule, G, state)
    assert torch.linalg.matrix_rank(D).item() == 1
    torch.testing.assert_close(D, polar_factor(G, "exact"), rtol=0, atol=1e-10)
    torch.testing.assert_close(state["Q"][..., 1:], before[..., 1:])  # directions for what may come


def test_a_matrix_wakes_up_after_zero_gradients():
    rule = Dion()
    G = random(1, 12, 8)
    D, state = step(rule, torch.zeros_like(G))
    assert not D.any()
    torch.testing.assert_close(step(rule, G, state)[0], step(rule, G)[0])


@pytest.mark.parametrize("shape", [(40, 1), (64, 12), (3, 100, 30), (8, 8)])
def test_randomized_cholesky_qr_spans_the_same_space(shape):
    A = random(*shape)
    P = rcqr(A)
    eye = torch.eye(shape[-1], dtype=A.dtype)
    torch.testing.assert_close(P.mT @ P, eye.expand(*shape[:-2], -1, -1), rtol=0, atol=1e-10)
    Q = qr(A)
    torch.testing.assert_close(P @ P.mT, Q @ Q.mT, rtol=0, atol=1e-9)


def test_randomized_cholesky_qr_survives_bad_condition():
    A = random(200, 20) * torch.logspace(0, -12, 20, dtype=torch.float64)
    P = rcqr(A)
    torch.testing.assert_close(P.mT @ P, torch.eye(20, dtype=A.dtype), rtol=0, atol=1e-10)
    A[:, 7] = A[:, 3]
    P = rcqr(A)
    assert not P[:, 7].any()
    others = [i for i in range(20) if i != 7]
    torch.testing.assert_close(P[:, others].mT @ P[:, others], torch.eye(19, dtype=A.dtype), rtol=0, atol=1e-9)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    rule = Dion()
    G = random(1, 100, 40)
    states = [step(rule, G)[1] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(states[0]["Q"], states[1]["Q"])
