"""The functional API computes its formulas: for lists of one and two, single matrices and batches, in any dtype."""

import pytest
import torch
from torch.testing import assert_close

import steepest
from steepest import functional
from steepest.linalg.eigenbasis import eigenbasis_error

INTO, BACK = [[0], [0]], [[0], [1]]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(*shape, seed=0, dtype=torch.float64):
    x = normal(*shape, shape[-1], seed=seed, dtype=dtype)
    return x @ x.mT + torch.eye(shape[-1], dtype=dtype)


def orthonormal(d, seed=0, dtype=torch.float64):
    return torch.linalg.qr(normal(d, d, seed=seed, dtype=dtype)).Q


def descending(K):
    """Eigenvectors by `torch.linalg.eigh`, by descending eigenvalue."""
    return torch.linalg.eigh(K).eigenvectors.flip(-1)


def batches(x, batch):
    return x.expand(*batch, *x.shape).clone()


def test_autocast_changes_nothing():
    """Covariances in bfloat16 are of no use, and results in the dtype of the arguments are what is promised."""
    single = torch.float32
    G, K, Q = normal(4, 6, dtype=single), spd(4, dtype=single), orthonormal(4, dtype=single)
    K6, Q6 = spd(6, seed=1, dtype=single), orthonormal(6, seed=1, dtype=single)

    def everything():
        L, R, v = K.clone(), K6.clone(), G.square()
        functional.update_kronecker_factors([L, R], G, 0.9)
        functional.update_kronecker_factors_kl_shampoo([L, R], G, 0.9, [Q, Q6], eps=1e-8)
        bases, M = [Q.clone(), Q6.clone()], G.clone()
        updated = functional.update_eigenbasis_and_exp_avgs([L, R], bases, v, M)
        qr = functional.get_eigenbasis_qr([L, R], [Q, Q6], v)
        products = [functional.precondition(G, [Q, Q6]), functional.conjugate(K, Q)]
        iterated = functional.orthogonal_iteration(K, Q)
        eigh = functional.get_eigenbasis_eigh([L, R])
        return [L, R, v, M, bases, updated, qr, products, iterated, eigh, *functional.eigh_with_fallback(K)]

    outside = everything()
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything()
        assert functional.all_eigenbases_met_criteria([K], [descending(K)], 1e-5)
    assert_close(inside, outside, rtol=0, atol=0)


# Projections.

X, Q4, Q6 = normal(4, 6), orthonormal(4), orthonormal(6, seed=1)


@pytest.mark.parametrize("dims", [None, INTO, ([0], [0]), ((0,), (0,)), [(0,), (0,)], [[-2], [-2]]])
def test_projections_into_bases(dims):
    assert_close(steepest.precondition(X, [Q4, Q6], dims), Q4.T @ X @ Q6)
    assert_close(steepest.precondition(X, [Q4], dims), torch.tensordot(Q4, X, [[0], [0]]))
    assert_close(steepest.precondition(X, (None, Q6), dims), torch.tensordot(X, Q6, [[1], [0]]))


@pytest.mark.parametrize("dims", [BACK, ([0], [1]), ((0,), (1,)), [[-2], [-1]]])
def test_projections_back(dims):
    assert_close(steepest.precondition(X, [Q4, Q6], dims), Q4 @ X @ Q6.T)
    assert_close(steepest.precondition(X, [Q4], dims), torch.tensordot(Q4, X, [[1], [0]]))
    assert_close(steepest.precondition(steepest.precondition(X, [Q4]), [Q4], dims), X)


@pytest.mark.parametrize("dims", [[[1], [0]], [[1], [1]], ((1,), (0,)), [[-1], [-1]]])
def test_projections_of_columns_are_tensordots(dims):
    assert_close(steepest.precondition(X, [Q6], dims), torch.tensordot(X, Q6, dims))


def test_two_contractions_by_tensordot_are_the_projection():
    """Each contraction of the first dimension puts the new one last; after two, both are back in their places."""
    for dims in (INTO, BACK):
        want = torch.tensordot(torch.tensordot(X, Q4, dims), Q6, dims)
        assert_close(steepest.precondition(X, [Q4, Q6], dims), want)


@pytest.mark.parametrize("bases", [None, [], (), [None], [None, None]])
@pytest.mark.parametrize("dims", [None, INTO, BACK])
def test_without_bases_nothing_is_projected(bases, dims):
    assert steepest.precondition(X, bases, dims) is X


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_projection_is_in_the_wider_dtype(dtype):
    y = steepest.precondition(X.to(dtype), [Q4.float()])
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(y, (Q4.T @ X.to(dtype).double()).to(y.dtype))
    assert steepest.precondition(X.bfloat16(), [Q4.bfloat16()]).dtype == torch.bfloat16


def test_a_basis_is_broadcast_over_a_batch():
    for Q in (Q4, Q4[None], batches(Q4, [3])):
        assert_close(steepest.precondition(batches(X, [3]), [Q, None]), batches(Q4.T @ X, [3]))
    assert_close(steepest.precondition(X, [batches(Q4, [3])]), batches(Q4.T @ X, [3]))


# Factors.


@pytest.mark.parametrize("factors", ["left", "right", "both", "tuple"])
def test_factors_take_in_outer_products(factors):
    L, R = spd(4), spd(6)
    want_L, want_R = 0.9 * L + 0.1 * X @ X.T, 0.9 * R + 0.1 * X.T @ X
    given = {"left": [L], "right": [None, R], "both": [L, R], "tuple": (L, R)}[factors]
    steepest.update_kronecker_factors(given, X, 0.9)
    assert_close(L, spd(4) if factors == "right" else want_L)
    assert_close(R, spd(6) if factors == "left" else want_R)


def test_a_decay_per_matrix():
    G = torch.ones(2, 2, 3)
    L, R = steepest.init_kronecker_factors([2, 2, 3])
    steepest.update_kronecker_factors([L, R], G, torch.tensor([0.0, 0.5]).view(2, 1, 1))
    assert torch.equal(L[0], torch.full((2, 2), 3.0))
    assert torch.equal(L[1], torch.full((2, 2), 1.5))


def test_kl_takes_in_whitened_gradients():
    """L ← β L + (1-β) G R⁻¹ Gᵀ / n with exact inverses, where nothing is floored."""
    L, R = spd(4), spd(6)
    want_L = 0.9 * L + 0.1 * X @ torch.linalg.inv(R) @ X.T / 6
    want_R = 0.9 * R + 0.1 * X.T @ torch.linalg.inv(L) @ X / 4
    steepest.update_kronecker_factors_kl_shampoo([L, R], X, 0.9, [descending(L), descending(R)], 0.0)
    assert_close(L, want_L)
    assert_close(R, want_R)


def test_kl_with_another_exponent():
    L, R = spd(4), spd(6)
    λ, Q = torch.linalg.eigh(R)
    want = 0.9 * L + 0.1 * X @ Q @ torch.diag(λ**-0.5) @ Q.T @ X.T / 6
    steepest.update_kronecker_factors_kl_shampoo([L, R], X, 0.9, [descending(L), Q], 0.0, -0.5)
    assert_close(L, want)


def test_kl_on_one_side_whitens_nothing():
    L, R = spd(4), spd(6)
    steepest.update_kronecker_factors_kl_shampoo([L], X, 0.9, [Q4], 1e-8)
    assert_close(L, 0.9 * spd(4) + 0.1 * X @ X.T / 6)
    steepest.update_kronecker_factors_kl_shampoo([None, R], X, 0.9, [None, Q6], 1e-8)
    assert_close(R, 0.9 * spd(6) + 0.1 * X.T @ X / 4)
    L = spd(4)
    steepest.update_kronecker_factors_kl_shampoo([L, R], X, 0.9, [Q4], 1e-8)
    assert_close(L, 0.9 * spd(4) + 0.1 * X @ X.T / 6)


def test_kl_with_a_relative_floor_scales_with_the_gradient():
    found = []
    for scale in (1.0, 1e-6):
        factors = steepest.init_kronecker_factors(X.shape, dtype=X.dtype)
        for step in range(3):
            bases = steepest.get_eigenbasis_eigh(factors)
            G = scale * normal(4, 6, seed=step)
            steepest.update_kronecker_factors_kl_shampoo(factors, G, 0.9, bases, 1e-8, relative_floor=1e-4)
        found.append([K / scale for K in factors])
    assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_lower_precision_count_in_the_factors_dtype(dtype):
    G, bases = X.to(dtype), [Q4.float(), Q6.float()]
    found, want = ([torch.eye(4), torch.eye(6)] for _ in range(2))
    steepest.update_kronecker_factors(found, G, 0.9)
    steepest.update_kronecker_factors(want, G.float(), 0.9)
    steepest.update_kronecker_factors_kl_shampoo(found, G, 0.9, bases, 1e-8)
    steepest.update_kronecker_factors_kl_shampoo(want, G.float(), 0.9, bases, 1e-8)
    assert all(torch.equal(K, L) for K, L in zip(found, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4)])
def test_empty_gradients(shape):
    G = torch.zeros(shape)
    L, R = factors = steepest.init_kronecker_factors(shape)
    L += 1
    R += 1
    want = [0.9**3 * K for K in factors]
    bases = steepest.get_eigenbasis_eigh(factors)
    steepest.update_kronecker_factors(factors, G, 0.9)
    steepest.update_kronecker_factors_kl_shampoo(factors, G, 0.9, bases, 1e-8)
    steepest.update_kronecker_factors_kl_shampoo(factors, G, 0.9, bases, 1e-8, relative_floor=1e-4)
    assert_close(factors, tuple(want))
    assert steepest.precondition(G, bases).shape == G.shape
    for use_eigh in (False, True):
        new, m, v = steepest.update_eigenbasis_and_exp_avgs(factors, bases, G.clone(), G.clone(), use_eigh=use_eigh)
        assert [Q.shape for Q in new] == [K.shape for K in factors]
        assert all(eigenbasis_error(K, Q).abs().amax() < 1e-5 for K, Q in zip(factors, new, strict=True) if K.numel())
        assert m.shape == v.shape == G.shape
    assert steepest.all_eigenbases_met_criteria(factors, new, 1e-5)


# Eigenbases.


@pytest.mark.parametrize("count", [1, 2, 3])
def test_full_decompositions(count):
    factors = [spd(3 + i, seed=i) for i in range(count)]
    for K, Q in zip(factors, steepest.get_eigenbasis_eigh(factors), strict=True):
        assert torch.equal(Q, descending(K))
    shifted = steepest.get_eigenbasis_eigh([*factors, None], eps=1.0)
    assert shifted[-1] is None
    assert torch.equal(shifted[0], descending(factors[0] + torch.eye(3, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eigenbases_in_lower_precision_go_by_float32(dtype):
    K, Q, v = spd(5, dtype=torch.float32).to(dtype), torch.eye(5, dtype=dtype), torch.rand(5, 3)
    (found,), in_order = steepest.get_eigenbasis_qr([K], [Q], v)
    (want,), want_v = steepest.get_eigenbasis_qr([K.float()], [Q.float()], v)
    assert found.dtype == dtype
    assert torch.equal(found, want.to(dtype))
    assert torch.equal(in_order, want_v)
    assert torch.equal(steepest.get_eigenbasis_eigh([K])[0], descending(K.float()).to(dtype))


@pytest.mark.parametrize("steps", [1, 3])
def test_orthogonal_iteration_by_its_formula(steps):
    """Q ← qr(K Q), the columns ordered by Rayleigh quotient first, up to the columns' signs."""
    L, R, v = spd(4), spd(6), normal(4, 6).square()
    given = v.clone()
    bases, found = steepest.get_eigenbasis_qr([L, R], [Q4, Q6], given, power_iter_steps=steps)
    for K, Q, new, dim in zip((L, R), (Q4, Q6), bases, (0, 1), strict=True):
        order = (Q.T @ K @ Q).diagonal().argsort(descending=True)
        want, v = Q[:, order], v.index_select(dim, order)
        for _ in range(steps):
            want = torch.linalg.qr(K @ want).Q
        assert_close((new.T @ want).abs(), torch.eye(len(K), dtype=torch.float64))
    assert_close(found, v)
    assert torch.equal(given, normal(4, 6).square())
    (alone,), found = steepest.get_eigenbasis_qr([L], [Q4], given, power_iter_steps=steps)
    assert torch.equal(alone, bases[0])
    assert torch.equal(found, given[(Q4.T @ L @ Q4).diagonal().argsort(descending=True)])


@pytest.mark.parametrize("sides", ["left", "right", "both"])
@pytest.mark.parametrize("use_eigh", [False, True])
def test_moments_follow_their_bases(use_eigh, sides):
    keep = {"left": (0,), "right": (1,), "both": (0, 1)}[sides]
    factors, old = ([x if i in keep else None for i, x in enumerate(pair)] for pair in ((spd(4), spd(6)), (Q4, Q6)))
    if sides == "left":
        factors, old = factors[:1], old[:1]
    m, v = normal(4, 6, seed=2), normal(4, 6, seed=3).square()
    raw = steepest.precondition(m, old, BACK)
    want_v = v.clone()
    for dim in keep:
        quotients = (old[dim].T @ factors[dim] @ old[dim]).diagonal()
        want_v = want_v.index_select(dim, quotients.argsort(descending=True))
    bases, found_m, found_v = steepest.update_eigenbasis_and_exp_avgs(factors, old, v, m, use_eigh)
    assert found_v is v, "changed in place"
    assert torch.equal(m, normal(4, 6, seed=2)), "not changed"
    assert len(bases) == len(old)
    if use_eigh:
        want = [None if K is None else descending(K) for K in factors]
    else:
        want, _ = steepest.get_eigenbasis_qr(factors, old, v)
    assert_close([Q for Q in bases if Q is not None], [Q for Q in want if Q is not None])
    assert_close(found_m, steepest.precondition(raw, bases, INTO))
    assert_close(v, want_v)


def test_second_moments_by_column_or_by_rank():
    """Where eigenvalues have crossed, moments go with their direction, or stay at their rank."""
    L, v = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for match_columns, want in ((True, v.flip(0)), (False, v)):
        bases, _, found = steepest.update_eigenbasis_and_exp_avgs(
            [L], [torch.eye(2)], v.clone(), torch.zeros(2, 2), use_eigh=True, match_columns=match_columns
        )
        assert torch.equal(bases[0].abs(), torch.eye(2).flip(0))
        assert torch.equal(found, want)
    _, _, found = steepest.update_eigenbasis_and_exp_avgs(
        [L], [torch.eye(2)], v.clone(), torch.zeros(2, 2), match_columns=False
    )
    assert torch.equal(found, v.flip(0)), "orthogonal iteration always keeps columns and moments together"


def test_a_matrix_that_cannot_be_decomposed_keeps_what_it_has():
    L, Q = torch.diag(torch.tensor([1.0, 4.0])).repeat(2, 1, 1), torch.eye(2).repeat(2, 1, 1)
    L[1] = torch.nan
    v, m = torch.rand(2, 2, 3), torch.rand(2, 2, 3)
    before = v.clone(), m.clone()
    (found,), m, _ = steepest.update_eigenbasis_and_exp_avgs([L], [Q], v, m, use_eigh=True)
    assert torch.equal(found[1], torch.eye(2))
    assert torch.equal(v[1], before[0][1])
    assert torch.equal(m[1], before[1][1])
    assert torch.equal(v[0], before[0][0].flip(0))


def test_criteria():
    K = spd(5)
    Q = steepest.get_eigenbasis_eigh([K])[0]
    assert steepest.all_eigenbases_met_criteria([K, K, K], [Q, Q, Q], 1e-10)
    assert not steepest.all_eigenbases_met_criteria([K, K], [Q, torch.eye(5).double()], 1e-5)
    assert steepest.all_eigenbases_met_criteria([None, torch.zeros(5, 5)], [None, torch.eye(5)])
    assert steepest.all_eigenbases_met_criteria([], [])
    turned = orthonormal(5)
    gap = 1 - ((turned.T @ K @ turned).diagonal().norm() / K.norm()).item()
    assert steepest.all_eigenbases_met_criteria([K], [turned], gap + 1e-9)
    assert not steepest.all_eigenbases_met_criteria([K], [turned], gap - 1e-9)


# All functions.


@pytest.mark.parametrize("batch", [(2,), (2, 3), (1, 2, 2)])
def test_leading_dimensions_are_a_batch(batch):
    G = normal(4, 6, dtype=torch.float32)
    L, R = steepest.init_kronecker_factors([4, 6])
    Ls, Rs = steepest.init_kronecker_factors([*batch, 4, 6])
    steepest.update_kronecker_factors([L, R], G, 0.9)
    steepest.update_kronecker_factors([Ls, Rs], batches(G, batch), 0.9)
    assert_close(Ls, batches(L, batch))
    bases = steepest.get_eigenbasis_eigh([L, R])
    many = steepest.get_eigenbasis_eigh([Ls, Rs])
    steepest.update_kronecker_factors_kl_shampoo([L, R], 2 * G, 0.5, bases, 1e-3)
    steepest.update_kronecker_factors_kl_shampoo([Ls, Rs], 2 * batches(G, batch), 0.5, many, 1e-3)
    assert_close(Rs, batches(R, batch), rtol=1e-4, atol=1e-4)
    v = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    one = steepest.update_eigenbasis_and_exp_avgs([L, R], bases, v.clone(), G)
    all_ = steepest.update_eigenbasis_and_exp_avgs([Ls, Rs], many, batches(v, batch), batches(G, batch))
    assert_close(all_[2], batches(one[2], batch))
    back = [steepest.precondition(m, Q, dims=BACK) for Q, m, _ in (one, all_)]
    assert_close(back[1], batches(back[0], batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("leaf", [True, False])
def test_no_result_holds_a_graph(leaf):
    """Whatever requires gradients: a gradient with a graph of its own, weights, factors, bases or moments."""

    def tracked(x):
        x = x.clone().requires_grad_()
        return x if leaf else x * 1

    G = tracked(X)
    plain = [spd(4), spd(6)]
    for factors in (plain, [tracked(K) for K in plain]):
        was = [K.requires_grad for K in factors]
        steepest.update_kronecker_factors(factors, G, 0.5)
        steepest.update_kronecker_factors_kl_shampoo(factors, G, 0.5, [tracked(Q4), tracked(Q6)], 1e-8)
        assert [K.requires_grad for K in factors] == was
        assert all(K.is_leaf == (leaf or not requires) for K, requires in zip(factors, was, strict=True))
        bases = steepest.get_eigenbasis_eigh(factors)
        v, m = tracked(X.square()), tracked(X)
        results = [
            *bases,
            steepest.precondition(G),
            steepest.precondition(G, [tracked(Q4)]),
            *steepest.get_eigenbasis_qr(factors, [tracked(Q4), tracked(Q6)], v)[0],
            steepest.get_eigenbasis_qr([], [], v)[1],
        ]
        new, m, _ = steepest.update_eigenbasis_and_exp_avgs(factors, [tracked(Q4), tracked(Q6)], v, m, use_eigh=True)
        results += [*new, m]
        assert not any(x.requires_grad for x in results)
        assert steepest.all_eigenbases_met_criteria(factors, bases, 1e-6)
    want = [spd(4), spd(6)]
    steepest.update_kronecker_factors(want, X, 0.5)
    steepest.update_kronecker_factors_kl_shampoo(want, X, 0.5, [Q4, Q6], 1e-8)
    assert_close(plain, want)


@pytest.mark.parametrize("kl", [False, True])
def test_soap_from_these_functions(kl):
    """Five steps of `steepest.SOAP` without its guards, written with the functions and a plain Adam."""
    W = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))  # square: no null space, whose basis is arbitrary
    optimizer = steepest.SOAP(
        [W], lr=0.1, betas=(0.9, 0.95), shampoo_beta=0.8, eps=1e-8, weight_decay=0, precondition_frequency=1,
        correct_bias=False, correct_shampoo_beta_bias=False, use_kl_shampoo=kl, noise_floor=0,
        momentum_floor=False,
    )  # fmt: skip
    ours, m, v = (torch.zeros_like(W.data) for _ in range(3))
    factors = steepest.init_kronecker_factors(W.shape, dtype=W.dtype)
    bases = [torch.eye(4, dtype=W.dtype), torch.eye(4, dtype=W.dtype)]
    for step in range(5):
        W.grad = normal(4, 4, seed=step)
        optimizer.step()
        if kl:
            steepest.update_kronecker_factors_kl_shampoo(factors, W.grad, 0.8, bases, 1e-8, relative_floor=1e-4)
        else:
            steepest.update_kronecker_factors(factors, W.grad, 0.8)
        bases, m, v = steepest.update_eigenbasis_and_exp_avgs(factors, bases, v, m, use_eigh=step == 0)
        g = steepest.precondition(W.grad, bases)
        m.lerp_(g, 0.1)
        v.lerp_(g.square(), 0.05)
        ours -= 0.1 * steepest.precondition(m / (v.sqrt() + 1e-8), bases, BACK)
        assert_close(W.data, ours, rtol=1e-6, atol=1e-8)


def test_everything_is_exported():
    names = [name for name in steepest.__all__ if getattr(steepest, name) is getattr(functional, name, None)]
    assert {"precondition", "conjugate", "eigh_with_fallback", "orthogonal_iteration"} < set(names)
    assert len(names) == 11


def test_the_functions_as_their_documentation_calls_them():
    """Arguments by position and name, with matrices that are neither symmetric nor orthonormal."""
    single = [torch.float32]
    L, R, QL, QR = (normal(d, d, seed=i, dtype=single[0]) for i, d in enumerate((10, 20, 10, 20)))
    exp_avg_sq, exp_avg = normal(10, 20, dtype=single[0]), normal(10, 20, dtype=single[0])
    bases, m, v = steepest.update_eigenbasis_and_exp_avgs([L, R], [QL, QR], exp_avg_sq, exp_avg)
    assert [tuple(Q.shape) for Q in bases] == [(10, 10), (20, 20)]
    assert m.shape == v.shape == (10, 20)
    assert steepest.precondition(exp_avg, [QL], dims=[[0], [0]]).shape == (10, 20)
    steepest.update_kronecker_factors([torch.zeros(10, 10), torch.zeros(20, 20)], exp_avg, shampoo_beta=0.95)
    steepest.update_kronecker_factors_kl_shampoo([L, R], exp_avg, 0.9, bases, eps=1e-8, eigval_exp=-1.0)
    assert not steepest.all_eigenbases_met_criteria([L, R], bases, adaptive_update_tolerance=1e-7)
    assert len(steepest.init_kronecker_factors(torch.Size([10, 20]), device=torch.device("cpu"))) == 2
