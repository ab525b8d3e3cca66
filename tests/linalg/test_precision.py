"""TF32, emulated: to the bit, only where it would be on, and never outside its scope."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction

import pytest
import torch

from steepest import SOAP, fp32_matmul_precision
from steepest.linalg.precision import PRECISIONS, has_tf32, round_to_tf32, tf32_emulated

ULP = 2.0**-10
"""The distance between TF32 numbers in [1, 2)."""
X = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.get_float32_matmul_precision()
    assert before == "highest", "a test before this one left another precision behind"
    yield
    assert torch.get_float32_matmul_precision() == before
    assert not torch.equal(round_to_tf32(X) @ round_to_tf32(Y), X @ Y), "the emulation is still on"


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (1.0, 1.0),
        (1 + ULP, 1 + ULP),
        (1 + 0.5 * ULP, 1.0),  # ties go to the even neighbour
        (1 + 1.5 * ULP, 1 + 2 * ULP),
        (1 + 2.5 * ULP, 1 + 2 * ULP),
        (1 + 0.5 * ULP + 2**-23, 1 + ULP),  # the least that is more than a tie
        (1 + 0.5 * ULP - 2**-23, 1.0),
        (2 - 2**-23, 2.0),  # carries into the exponent
        (-1 - 1.5 * ULP, -1 - 2 * ULP),
        (torch.finfo(torch.float32).max, math.inf),  # as rounding to nearest has it: TF32's largest is smaller
        (-torch.finfo(torch.float32).max, -math.inf),
        (2.0**-126, 2.0**-126),
        (2.0**-149, 0.0),  # denormal numbers: the grid is 2^-136 down there
        (2.0**-136, 2.0**-136),
        (1.5 * 2.0**-136, 2.0**-135),
        (2.5 * 2.0**-136, 2.0**-135),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
    ],
)
def test_rounding_to_nearest_ties_to_even(x, rounded):
    assert round_to_tf32(torch.tensor([x])).tolist() == [rounded]


def test_signs_of_zero_and_every_nan_stay():
    zeros = round_to_tf32(torch.tensor([0.0, -0.0]))
    assert zeros.tolist() == [0.0, 0.0]
    assert zeros.signbit().tolist() == [False, True]
    # Payloads in the lowest bits only, which rounding would turn into infinity, and in all, which would overflow.
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_to_tf32(nans).isnan().all()


def test_rounding_against_exact_arithmetic():
    """Random bit patterns of every exponent: the result is on TF32's grid, the nearest there, and even at ties."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator).to(torch.int32)
    bits[::4] = (bits[::4] & ~0x1FFF) | 0x1000  # exact ties
    x = bits.view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 3e38)]
    rounded = round_to_tf32(x)
    assert (rounded.view(torch.int32) & 0x1FFF == 0).all()
    for a, b in zip(x.tolist(), rounded.tolist(), strict=True):
        grid = Fraction(2) ** (max(math.frexp(a)[1] - 1, -126) - 10)
        assert Fraction(b) == round(Fraction(a) / grid) * grid  # Python's round takes ties to even
    assert torch.equal(round_to_tf32(rounded), rounded), "rounding twice is rounding once"


def test_rounding_keeps_layout_and_other_dtypes():
    assert torch.equal(round_to_tf32(X.mT), round_to_tf32(X).mT)
    assert torch.equal(round_to_tf32(X[::2, 1]), round_to_tf32(X)[::2, 1])
    assert round_to_tf32(torch.tensor(1 + 0.5 * ULP)).shape == ()
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        x = torch.arange(3).to(dtype)
        assert round_to_tf32(x) is x
    kept = X.clone()
    round_to_tf32(kept)
    assert torch.equal(kept, X)


PRODUCTS = {
    "matmul": lambda a, b: a @ b,
    "batched": lambda a, b: (a[None] @ b[None])[0],
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "linear": lambda a, b: torch.nn.functional.linear(a, b.mT),
    "addmm": lambda a, b: torch.addmm(torch.zeros(16, 16), a, b),
    "addmm_": lambda a, b: torch.zeros(16, 16).addmm_(a, b),
    "baddbmm": lambda a, b: torch.baddbmm(torch.zeros(1, 16, 16), a[None], b[None])[0],
    "baddbmm_": lambda a, b: torch.zeros(1, 16, 16).baddbmm_(a[None], b[None])[0],
    "addbmm": lambda a, b: torch.addbmm(torch.zeros(16, 16), a[None], b[None]),
    "out": lambda a, b: torch.mm(a, b, out=torch.empty(16, 16)),
    "keywords": lambda a, b: torch.mm(input=a, mat2=b),
    "multi_dot": lambda a, b: torch.linalg.multi_dot([a, b]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_factors_of_products_are_rounded(name):
    product = PRODUCTS[name]
    exact, rounded = product(X, Y), product(round_to_tf32(X), round_to_tf32(Y))
    assert not torch.equal(exact, rounded)
    with tf32_emulated():
        assert torch.equal(product(X, Y), exact)
        for precision in PRECISIONS:
            with fp32_matmul_precision(precision):
                assert torch.equal(product(X, Y), exact if precision == "highest" else rounded)


def test_what_is_added_and_what_is_summed_stays_float32():
    with tf32_emulated(), fp32_matmul_precision("high"):
        added = torch.addmm(X, torch.zeros(16, 16), Y)
        many = torch.ones(1, 2**12 + 1) @ torch.ones(2**12 + 1, 1)  # more than TF32 can hold
    assert torch.equal(added, X)
    assert many.item() == 2**12 + 1


def test_what_tensor_cores_do_not_compute_is_left_alone():
    S = X @ X.mT

    def others():
        vectors = [X @ Y[:, 0], X[0] @ Y[0], X.sum(dim=0)]
        decompositions = [*torch.linalg.eigh(S), torch.linalg.qr(X).R, torch.linalg.inv(X)]
        return [*vectors, *decompositions, X * Y, X.double() @ Y.double()]

    exact = others()
    with tf32_emulated(), fp32_matmul_precision("high"):
        emulated = others()
    for a, b in zip(exact, emulated, strict=True):
        assert torch.equal(a, b)


def test_the_scope_ends_with_an_error_too():
    exact = X @ Y
    with pytest.raises(KeyError), tf32_emulated(), fp32_matmul_precision("high"):
        raise KeyError
    with fp32_matmul_precision("high"):
        assert torch.equal(X @ Y, exact)
    with tf32_emulated(), fp32_matmul_precision("high"):
        with tf32_emulated():
            pass
        assert not torch.equal(X @ Y, exact), "an inner scope ended the outer one"


def test_an_optimizer_is_emulated_only_inside():
    """At "high" a step outside the scope is float32's on a device without TF32; inside it is not."""

    def step(precision):
        W = torch.nn.Parameter(torch.zeros(16, 16))
        opt = SOAP([W], lr=1.0, fp32_matmul_prec=precision, qr_fp32_matmul_prec=precision)
        for G in (X, Y):
            W.grad = G.clone()
            opt.step()
        return W.detach()

    ordinary = step("highest")
    assert torch.equal(step("high"), ordinary)
    with tf32_emulated():
        assert torch.equal(step("highest"), ordinary)
        assert not torch.equal(step("high"), ordinary)


def test_which_devices_have_it(monkeypatch):
    assert not has_tf32("cpu")
    assert not has_tf32(torch.device("meta"))
    for version, capability, has in (("12.8", (8, 0), True), ("12.8", (9, 0), True), ("12.8", (7, 5), False)):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_tf32("cuda") is has
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD's GPUs calls them cuda too
    assert not has_tf32("cuda:0")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("before", ["highest", "high"])
def test_precision_is_a_scope(precision, before):
    torch.set_float32_matmul_precision(before)
    try:
        backends = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        with contextlib.suppress(KeyError), fp32_matmul_precision(precision):
            assert torch.get_float32_matmul_precision() == precision
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
        after = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        assert after == backends
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="precision='low'"), fp32_matmul_precision("low"):
        pass
