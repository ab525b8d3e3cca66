"""Properties of SOAP: it is AdamW without bases and equivariant with them, and moments match their columns."""

import pytest
import torch

import steepest
from steepest import precondition


def steps(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(*shapes, seed=100, dtype=torch.float32):
    return [torch.nn.Parameter(randn(*shape, seed=seed + i, dtype=dtype)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_bases_it_is_adamw(shape, weight_decay):
    ours, theirs = parameters(shape, dtype=torch.float64), parameters(shape, dtype=torch.float64)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    soap, adamw = steepest.SOAP(ours, **options, max_precond_dim=0), torch.optim.AdamW(theirs, **options)
    for t in range(30):
        grads = [[randn(*shape, seed=t, dtype=torch.float64)]]
        steps(soap, ours, grads)
        steps(adamw, theirs, grads)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-13)


def test_warming_up_it_is_adamw_and_then_not():
    ours, theirs = parameters((4, 6)), parameters((4, 6))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    soap, adamw = steepest.SOAP(ours, **options, adam_warmup_steps=5), torch.optim.AdamW(theirs, **options)
    for t in range(6):
        grads = [[randn(4, 6, seed=t)]]
        steps(soap, ours, grads)
        steps(adamw, theirs, grads)
        same = torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-6)
        assert same == (t < 5), "the first basis comes exactly when the warm-up ends"


@pytest.mark.parametrize("frequency", [3, 7])
def test_the_first_basis_waits_for_no_frequency(frequency):
    (W,) = parameters((4, 4))
    opt = steepest.SOAP([W], lr=1e-2, adam_warmup_steps=2, precondition_frequency=frequency)
    for t in range(3):
        steps(opt, [W], [[randn(4, 4, seed=t)]])
        turned = not torch.equal(opt.state[W]["Q_L"], torch.eye(4))
        assert turned == (t == 2)


@pytest.mark.parametrize("options", [{}, {"precondition_frequency": 3}, {"solver": "eigh"}, {"basis_timing": "after"}])
@pytest.mark.parametrize("guards", [{}, {"noise_floor": 0.0, "momentum_floor": False}], ids=["guarded", "bare"])
def test_rotating_the_gradients_rotates_the_updates(options, guards):
    """In float64, on square matrices: elsewhere null directions are the solver's choice."""
    n = 6
    U, V = (torch.linalg.qr(randn(n, n, seed=s, dtype=torch.float64)).Q for s in (1, 2))
    results = []
    for left, right in ((torch.eye(n).double(), torch.eye(n).double()), (U, V)):
        W = torch.nn.Parameter(torch.zeros(n, n, dtype=torch.float64))
        opt = steepest.SOAP([W], lr=0.1, weight_decay=0.0, **options, **guards)
        steps(opt, [W], [[left @ randn(n, n, seed=t, dtype=torch.float64) @ right.T] for t in range(2, 12)])
        results.append(left.T @ W.detach() @ right)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_the_sign_of_eigenvectors_says_nothing():
    ours, flipped = parameters((4, 6)), parameters((4, 6))
    opts = [steepest.SOAP(p, lr=0.1, precondition_frequency=2) for p in (ours, flipped)]
    for t in range(8):
        for p, opt in zip((ours, flipped), opts, strict=True):
            steps(opt, p, [[randn(4, 6, seed=t)]])
        state = opts[1].state[flipped[0]]
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
        state["Q_L"].mul_(signs)
        state["exp_avg"].mul_(signs.unsqueeze(1))
    torch.testing.assert_close(ours[0], flipped[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["qr", "auto", "cholesky", "first_order", "eigh"])
@pytest.mark.parametrize("shape", [(8, 8), (16, 40)])
def test_bases_stay_orthogonal(solver, shape):
    assert orthogonality_error(solver, shape, 1000) < 1e-5


def test_bases_stay_orthogonal_over_a_thousand_steps():
    assert orthogonality_error("auto", (5, 9), 1000) < 1e-5


def orthogonality_error(solver, shape, count):
    (W,) = parameters(shape)
    opt = steepest.SOAP([W], lr=1e-3, precondition_frequency=1, solver=solver)
    for t in range(count):
        steps(opt, [W], [[randn(*shape, seed=t)]])
    bases = [opt.state[W][name] for name in ("Q_L", "Q_R")]
    return max((Q.T @ Q - torch.eye(len(Q))).abs().max().item() for Q in bases)


@pytest.mark.parametrize("solver", ["qr", "auto", "cholesky", "first_order", "eigh"])
@pytest.mark.parametrize("kl", [False, True])
def test_eigenvalue_column_and_second_moment_belong_together(solver, kl):
    """Gradients along fixed axes exchange their sizes; each axis keeps its second moment through the crossing."""
    rows = torch.linalg.qr(randn(3, 3, seed=5)).Q
    W = torch.nn.Parameter(torch.zeros(3, 3))
    opt = steepest.SOAP(
        [W], lr=0.0, precondition_frequency=1, solver=solver, power_iter_steps=20, shampoo_beta=0.5,
        betas=(0.9, 0.99), use_kl_shampoo=kl,
    )  # fmt: skip
    columns = torch.linalg.qr(randn(3, 3, seed=6)).Q
    state = opt.state[W]
    history = torch.zeros(3)
    for t in range(12):
        sizes = torch.tensor([4.0, 2.0, 1.0]) if t < 6 else torch.tensor([1.0, 2.0, 4.0])
        history = 0.99 * history + 0.01 * sizes.square()
        steps(opt, [W], [[rows @ torch.diag(sizes) @ columns]])
        for basis, factor, axes in (("Q_L", "L", rows), ("Q_R", "R", columns.T)):
            Q, K = state[basis], state[factor]
            quotients = K.diagonal() if kl else (K @ Q * Q).sum(0)
            which = (axes.T @ Q).abs().argmax(0)  # the axis that each column follows
            assert sorted(which.tolist()) == [0, 1, 2]
            owned = state["exp_avg_sq"].amax(dim=1 if basis == "Q_L" else 0)
            torch.testing.assert_close(owned, history[which], rtol=0.05, atol=1e-4)
            if solver == "eigh":
                assert (quotients.diff() <= 1e-4 * quotients[0]).all()


def test_the_momentum_is_turned_at_refreshes_only():
    (W,) = parameters((4, 6))
    opt = steepest.SOAP([W], lr=0.0, precondition_frequency=4, betas=(0.9, 0.95))
    state = opt.state[W]
    raw = torch.zeros(4, 6)
    for t in range(9):
        before = state["exp_avg"].clone()
        bases = [state["Q_L"].clone(), state["Q_R"].clone()]
        G = randn(4, 6, seed=t)
        steps(opt, [W], [[G]])
        raw = 0.9 * raw + 0.1 * G
        now = [state["Q_L"], state["Q_R"]]
        refreshed = not torch.equal(now[0], bases[0])
        assert refreshed == (t % 4 == 0)
        if not refreshed:
            expected = 0.9 * before + 0.1 * precondition(G, bases)
            torch.testing.assert_close(state["exp_avg"], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(precondition(state["exp_avg"], now, dims=[[0], [1]]), raw, rtol=0, atol=1e-5)


def test_l2_reaches_adam_but_not_the_covariances():
    with_decay, without = parameters((4, 4)), parameters((4, 4))
    opts = [
        steepest.SOAP(with_decay, lr=0.0, weight_decay=0.5, weight_decay_method="l2"),
        steepest.SOAP(without, lr=0.0, weight_decay=0.0),
    ]
    G = randn(4, 4)
    for p, opt in zip((with_decay, without), opts, strict=True):
        steps(opt, p, [[G]])
    a, b = opts[0].state[with_decay[0]], opts[1].state[without[0]]
    assert torch.equal(a["L"], b["L"])
    assert torch.equal(with_decay[0].grad, G)
    expected = precondition(0.1 * (G + 0.5 * with_decay[0].detach()), [a["Q_L"], a["Q_R"]])
    torch.testing.assert_close(a["exp_avg"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "factor"), [("decoupled", 1 - 0.1 * 0.5), ("independent", 0.5), ("palm", 1 - 0.01 * 0.5), ("l2", 1.0)]
)
def test_decay_methods(method, factor):
    (W,) = parameters((3, 3))
    start = W.detach().clone()
    opt = steepest.SOAP([W], lr=0.1, weight_decay=0.5, weight_decay_method=method, eps=1.0)
    W.grad = torch.zeros(3, 3)
    if method == "l2":
        opt.param_groups[0]["lr"] = 0.0
    opt.step()
    torch.testing.assert_close(W.detach(), factor * start)


@pytest.mark.parametrize("kl_floor", [1e-4, 1e-2])
def test_kl_with_a_relative_floor_knows_no_scale(kl_floor):
    factors = []
    for scale in (1.0, 2.0**14):  # a power of four, so that rounding scales along, under square roots too
        W = torch.nn.Parameter(torch.zeros(4, 6))
        opt = steepest.SOAP([W], lr=0.0, use_kl_shampoo=True, kl_floor=kl_floor)
        steps(opt, [W], [[scale * randn(4, 6, seed=t)] for t in range(10)])
        factors.append(opt.state[W]["L"] / scale)
    torch.testing.assert_close(factors[0], factors[1], rtol=1e-6, atol=0)


def test_adaptive_refreshes_skip_what_is_good_enough():
    (W,) = parameters((4, 4))
    opt = steepest.SOAP(
        [W], lr=1e-2, precondition_frequency=1, use_adaptive_criteria=True, adaptive_update_tolerance=1.0
    )
    bases = []
    for t in range(4):
        steps(opt, [W], [[randn(4, 4, seed=t)]])
        bases.append(opt.state[W]["Q_L"].clone())
    assert not torch.equal(bases[0], torch.eye(4)), "the first basis is never skipped"
    assert all(torch.equal(Q, bases[0]) for Q in bases)
    opt.param_groups[0]["adaptive_update_tolerance"] = 0.0
    steps(opt, [W], [[randn(4, 4, seed=9)]])
    assert not torch.equal(opt.state[W]["Q_L"], bases[0])


def test_a_frequency_may_be_a_function():
    (W,) = parameters((4, 4))
    seen = []
    opt = steepest.SOAP([W], lr=1e-2, precondition_frequency=lambda step: seen.append(step) or (1 if step < 3 else 4))
    bases = []
    for t in range(10):
        before = opt.state[W]["Q_L"].clone()
        steps(opt, [W], [[randn(4, 4, seed=t)]])
        bases.append(not torch.equal(before, opt.state[W]["Q_L"]))
    assert [t for t, new in enumerate(bases) if new] == [0, 1, 2, 6], "four steps after the last of the frequent ones"
    assert max(seen) == 9


def test_rekls_is_soap_with_three_options():
    ours, theirs = parameters((4, 6)), parameters((4, 6))
    rekls = steepest.REKLS(ours, lr=1e-2)
    soap = steepest.SOAP(theirs, lr=1e-2, use_eigh=True, use_kl_shampoo=True, precondition_frequency=1)
    grads = [[randn(4, 6, seed=t)] for t in range(5)]
    steps(rekls, ours, grads)
    steps(soap, theirs, grads)
    assert torch.equal(ours[0], theirs[0])
