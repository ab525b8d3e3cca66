"""Properties of every orthogonalizing and whitening rule: zero, stacks, clocks, the meta device."""

import pytest
import torch

import steepest
from steepest.engine.optimizer import Optimizer
from steepest.rule import Rule, Step, whole
from steepest.rules import RULES

CASES = {
    "muon": {},
    "muon exact": {"ns": "exact"},
    "muon without eps": {"eps": 0.0},
    "normuon": {},
    "normuon by columns": {"axis": "columns"},
    "adamuon": {},
    "dion": {},
    "dion by qr": {"orthonormalize": "qr"},
    "dion2": {},
    "shampoo": {},
    "shampoo without eps": {"eps": 0.0, "graft": "none"},
    "shampoo of sums": {"shampoo_beta": 1.0, "graft": "sgd"},
    "kl_shampoo": {"graft": "rmsprop"},
    "shampoo, one-sided": {"max_precond_dim": 10},
}


@pytest.fixture(params=CASES)
def rule(request):
    return RULES[request.param.split()[0].strip(",")](**CASES[request.param])


@pytest.fixture
def optimizer(rule):
    return lambda params, **options: Optimizer(params, rule.name, **(rule.__dict__ | options))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_blocks_are_matrices_of_their_own():
    whole, pieces = torch.nn.Parameter(random(8, 6)), []
    blocked = steepest.Shampoo([whole], lr=0.1, block_size=4)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 3), slice(3, 6)):
            W = torch.nn.Parameter(random(8, 6)[rows, columns].clone())
            pieces.append((W, rows, columns, steepest.Shampoo([W], lr=0.1)))
    for t in range(3):
        whole.grad = random(8, 6, seed=t + 1)
        blocked.step()
        for W, rows, columns, alone in pieces:
            W.grad = whole.grad[rows, columns].clone()
            alone.step()
    for W, rows, columns, _ in pieces:
        torch.testing.assert_close(whole[rows, columns], W, rtol=0, atol=1e-6)
    assert tuple(blocked.state[whole]["L.3"].shape) == (4, 4)


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (1, 7), (7, 1)])
def test_zero_gradients_move_nothing(optimizer, shape):
    W = torch.nn.Parameter(random(*shape))
    start = W.detach().clone()
    opt = optimizer([W], lr=1.0, weight_decay=0.0)
    for _ in range(3):
        W.grad = torch.zeros(shape)
        opt.step()
        assert torch.equal(W, start)
    W.grad = random(*shape, seed=1)
    opt.step()
    assert torch.isfinite(W).all()
    assert not torch.equal(W, start)
    assert all(torch.isfinite(x).all() for x in opt.state[W].values())


def test_a_matrix_does_not_know_its_neighbours(rule: Rule):
    G = random(3, 6, 10)
    G[1] = 0
    together, alone = rule.init(G), [rule.init(G[i : i + 1]) for i in range(3)]
    for t in range(1, 4):
        stage = rule.stage(t - 1)
        step = Step(torch.full((3, 1, 1), float(t)), stage, slice(None))
        kept = G.clone()
        D = whole(rule.update(G, together, step))
        assert torch.equal(G, kept)
        for i in range(3):
            one = whole(rule.update(G[i : i + 1], alone[i], Step(step.t[i : i + 1], stage, slice(None))))
            torch.testing.assert_close(D[i : i + 1], one, rtol=0, atol=1e-4)
        G = G.roll(1, dims=2)


def test_state_can_be_laid_out_without_memory(rule: Rule):
    state = rule.init(torch.empty(2, 6, 10, device="meta"))
    real = rule.init(torch.empty(2, 6, 10))
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in real.items()}
    assert all(x.is_meta for x in state.values())
    assert all(len(x) == 2 for x in state.values())


def test_a_saved_run_goes_on_bit_for_bit(optimizer):
    def run(steps, saved=None):
        W = torch.nn.Parameter(random(6, 10) if saved is None else saved["W"].clone())
        opt = optimizer([W], lr=0.1)
        if saved is not None:
            opt.load_state_dict(saved["opt"])
        for seed in steps:
            W.grad = random(6, 10, seed=seed)
            opt.step()
        return {"W": W.detach().clone(), "opt": opt.state_dict()}

    assert torch.equal(run(range(6))["W"], run(range(3, 6), run(range(3)))["W"])


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("muon", "momentum", 1.0, r"momentum=1.0: must be a number in \[0, 1\)"),
        ("muon", "scale", "spectral", "scale='spectral': must be one of 'none', 'original'"),
        ("muon", "ns", "keler", "ns='keler': must be one of 'keller'"),
        ("muon", "eps", -1.0, "eps=-1.0: must be a finite number >= 0"),
        ("normuon", "axis", "both", "axis='both': must be one of 'rows', 'columns'"),
        ("dion", "rank_fraction", 0.0, "rank_fraction=0.0: must be a number in"),
        ("dion", "orthonormalize", "svd", "orthonormalize='svd': must be one of 'qr', 'rcqr'"),
        ("dion2", "fraction", 1.5, "fraction=1.5: must be a number in"),
        ("shampoo", "exponent", 0.25, "exponent=0.25: must be a number < 0"),
        ("shampoo", "shampoo_beta", 1.01, r"shampoo_beta=1.01: must be a number in \[0, 1\]"),
        ("shampoo", "graft", "lion", "graft='lion': must be one of 'none', 'sgd', 'adam', 'rmsprop'"),
        ("lion", "betas", (0.9, 1.0), r"betas=\(0.9, 1.0\): must be two numbers in"),
    ],
)
def test_bad_options_are_named(name, option, value, words):
    with pytest.raises(ValueError, match=words):
        RULES[name](**{option: value})
