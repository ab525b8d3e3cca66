import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.linalg import polar
from steepest.linalg.polar import METHODS, TABLES, polar_factor

IN_GOLDEN = {"polar": "exact", "kj5": "keller"} | {
    name: name for name in ("quintic_you", "polar_express_dion", "cans", "deepseekv4", "cubic5")
}
HALF = [name for name, table in TABLES.items() if table.half]
SHAPES = ("2x3", "3x2", "4x4", "6x9")
# What each table makes of singular values from 0.01 on, as a fraction of the Frobenius norm.
BANDS = {
    "keller": (0.68, 1.21),
    "quintic_you": (0.82, 1.18),
    "polar_express_5": (0.75, 1.25),
    "polar_express_dion": (0.80, 1.20),
    "cans": (0.75, 1.25),
    "cubic5": (0.65, 1.35),
    "deepseekv4": (0.99, 1.01),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IN_GOLDEN)
def test_every_table_gives_its_authors_numbers(golden, name, shape):
    case = golden("newton_schulz")[shape]
    G, expected = (torch.tensor(case[key], dtype=torch.float64) for key in ("G", name))
    torch.testing.assert_close(polar_factor(G, IN_GOLDEN[name]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_takes_singular_values_into_its_band(name):
    sigma = torch.logspace(-2, 0, 400, dtype=torch.float64)
    for a, b, c in TABLES[name].steps:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    low, high = BANDS[name]
    assert low <= sigma.min()
    assert sigma.max() <= high


@given(
    m=st.integers(1, 32),
    n=st.integers(1, 32),
    rank=st.integers(0, 32),
    scale=st.floats(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_the_exact_polar_factor_has_orthonormal_rows_in_the_row_space(m, n, rank, scale, seed):
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(d, rank, dtype=torch.float64, generator=generator) for d in (m, n))
    Q_A, Q_B = torch.linalg.qr(A).Q, torch.linalg.qr(B).Q
    sigma = torch.linspace(1, 3, rank, dtype=torch.float64)
    G = 10**scale * (Q_A * sigma) @ Q_B.mT
    torch.testing.assert_close(polar_factor(G, "exact"), Q_A @ Q_B.mT, rtol=0, atol=1e-12)


@given(
    method=st.sampled_from(METHODS),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 32), st.integers(1, 32)),
    scale=st.floats(-4, 6),
    seed=st.integers(0, 2**31),
)
def test_any_method_on_any_batch(method, shape, scale, seed):
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    O = polar_factor(10**scale * G, method, eps=0.0)
    assert O.shape == shape
    assert torch.isfinite(O).all()
    torch.testing.assert_close(O, polar_factor(G, method, eps=0.0), rtol=0, atol=1e-9)  # whatever the scale
    torch.testing.assert_close(O.mT, polar_factor(G.mT, method, eps=0.0), rtol=0, atol=1e-9)  # and the orientation
    for one, alone in zip(O, G, strict=True):
        torch.testing.assert_close(one, polar_factor(alone, method, eps=0.0), rtol=0, atol=1e-9)
    assert not O.numel() or torch.linalg.matrix_norm(O, 2).max() < 1.36


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gives_zero(method, eps, dtype):
    G = torch.zeros(2, 4, 9, dtype=dtype)
    G[1, 2, 3] = 5.0
    O = polar_factor(G, method, eps=eps)
    assert torch.equal(O[0], G[0])
    assert O[1, 2, 3] > 0.6
    assert O[1].count_nonzero() == 1


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("spectrum", ["flat", "wide", "deficient"])
def test_the_gram_form_agrees_with_the_plain_one(name, spectrum, monkeypatch):
    s, l = 64, 160
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, s, dtype=torch.float64, generator=generator)).Q for d in (s, l))
    sigma = {
        "flat": torch.ones(s),
        "wide": torch.logspace(0, -12, s),
        "deficient": (torch.arange(s) < s // 2).float(),
    }[spectrum].double()
    G = (U * sigma) @ V.mT
    gram = polar_factor(G.float(), name)
    monkeypatch.setattr(polar, "GRAM_ASPECT", float("inf"))
    plain = polar_factor(G, name)
    assert torch.linalg.matrix_norm(gram.double() - plain, 2) < 4e-3


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("columns", [40, 96])
def test_16_bits_stay_near(name, dtype, rank_one, columns):
    generator = torch.Generator().manual_seed(0)
    k = 1 if rank_one else 40
    G = torch.randn(24, k, generator=generator) @ torch.randn(k, columns, generator=generator)
    coarse, fine = (polar_factor(G, name, dtype=d) for d in (dtype, torch.float32))
    assert coarse.dtype == torch.float32
    assert torch.linalg.matrix_norm(coarse, 2) < 1.36
    if not rank_one:  # beyond the rank, rounding is lifted too
        assert (coarse - fine).norm() / fine.norm() < (0.03 if dtype == torch.bfloat16 else 0.006)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("aspect", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_float16_keeps_singular_vectors_and_bands(name, aspect, condition):
    """Where float64 takes each singular value is known from the table; vectors are those of the matrix."""
    U, sigma, V = decomposed(48, 48 * aspect, condition)
    G, steps, safety = (U * sigma) @ V.mT, TABLES[name].steps, TABLES[name].safety
    O = polar_factor(G.float(), name, eps=0.0, dtype=torch.float16).double()
    reached = U.mT @ O @ V  # diagonal, were there no rounding
    exact = sigma / (safety * sigma.norm())
    for a, b, c in steps:
        exact = a * exact + b * exact**3 + c * exact**5
    if len(steps) == 5:  # Jordan's polynomial, eight times, throws neighbouring numbers far apart, within its band
        assert torch.linalg.matrix_norm(reached - exact.diag(), 2) < 0.08
    low, high = BANDS[name]
    large = sigma > 1e-2 * safety * sigma.norm()
    singular = torch.linalg.svdvals(reached)
    assert singular.max() < high + 0.05
    assert torch.linalg.svdvals(reached[large]).min() > low - 0.05


@pytest.mark.parametrize("name", ["keller", "quintic_you", "polar_express_5", "polar_express_dion"])
def test_float16_needs_a_second_gram_matrix_early(name, monkeypatch):
    U, sigma, V = decomposed(48, 192, 1e6)
    G = (U * sigma) @ V.mT
    fine = polar_factor(G, name)

    def error():
        return torch.linalg.matrix_norm(polar_factor(G.float(), name, dtype=torch.float16) - fine, 2)

    restarted = error()
    monkeypatch.setattr(polar, "HALF_FIRST", polar.GRAM_STEPS)
    assert not error() < 4 * restarted  # it may be NaN


def decomposed(m, n, condition):
    """Random singular vectors of a wide matrix and singular values between 1 and their smallest, by logarithm."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, m, dtype=torch.float64, generator=generator)).Q for d in (m, n))
    return U, torch.logspace(0, -math.log10(condition), m, dtype=torch.float64), V


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_near_as_public_implementations(golden, shape):
    case = golden("newton_schulz")[shape]
    G, exact, *public = (torch.tensor(case[key]) for key in ("G", "kj5", "kj5_bf16_KellerJordan", "kj5_bf16_torch"))
    error = (polar_factor(G, "keller", dtype=torch.bfloat16) - exact).norm()
    assert error < 1.5 * max((other - exact).norm() for other in public)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-22, 1e-16, 1e15])
def test_gradients_of_any_size_are_safe_without_eps(scale):
    G = scale * torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    O = polar_factor(G, "keller", eps=0.0)
    norms = torch.linalg.matrix_norm(O, 2)
    assert (norms < 1.25).all()
    assert (norms > 0.6).all() if scale > 1e-18 else not O.any()


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"method='kellar': must be one of 'keller'"):
        polar_factor(torch.eye(2), "kellar")
