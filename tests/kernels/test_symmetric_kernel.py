"""The symmetric kernels against float64, and against what they must not touch."""

import pytest
import torch
from long import pairs

from steepest import kernels
from steepest.kernels import use
from steepest.linalg.polar import polar_factor
from steepest.linalg.symmetric import accumulate_gram, gram, symmetric_product

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 5e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}
CLOSE[torch.float16] = {"rtol": 1e-3, "atol": 2e-3}


def symmetric(X):
    return X @ X.mT / X.shape[-1]


def is_symmetric(K):
    return torch.equal(K, K.mT)


@pytest.mark.parametrize(
    ("shape", "beta", "transposed"),
    pairs([(1, 1), (1, 40), (33, 1), (65, 130), (150, 17)], ["a number", "zero", "one per matrix"], [False, True]),
    ids=str,
)
def test_a_covariance_takes_a_gradient_in(launched, normal, shape, beta, transposed):
    d, k = shape
    X = normal(3, k, d).mT if transposed else normal(3, d, k)
    K = symmetric(normal(3, d, 5, seed=1))
    K = (K + K.mT) / 2
    decay = {"a number": 0.9, "zero": 0.0, "one per matrix": torch.tensor([0.0, 0.5, 0.99], device=X.device)}[beta]
    decay = decay.view(3, 1, 1) if isinstance(decay, torch.Tensor) else decay
    expected = decay * K.double() + (1 - decay) * 0.5 * X.double() @ X.double().mT
    with use("always"):
        accumulate_gram(K, X, decay, scale=0.5)
    torch.testing.assert_close(K.double(), expected.double(), **CLOSE[torch.float32])
    assert is_symmetric(K)
    assert launched == ["_launch"]


@pytest.mark.parametrize(("d", "dtype"), pairs([1, 50, 70, 130], CLOSE), ids=str)
def test_polynomials_and_gram_matrices(launched, normal, d, dtype):
    X = normal(2, d, 40, dtype=dtype)
    with use("always"):
        A = gram(X / 40**0.5)
        P = symmetric_product(A, A, A, beta=-2.0, alpha=0.5)
        square = symmetric_product(P, A)
        one = symmetric_product(A[1], A[1], A[1], beta=-2.0, alpha=0.5)
    close = CLOSE[dtype]
    torch.testing.assert_close(A.double(), X.double() @ X.double().mT / 40, **close)
    scale = (A.double() @ A.double()).abs().max()
    expected = -2 * A.double() + 0.5 * A.double() @ A.double()
    torch.testing.assert_close(P.double() / scale, expected / scale, **close)
    scale = scale * P.double().abs().max()
    torch.testing.assert_close(square.double() / scale, P.double() @ A.double() / scale, **close)
    assert P.dtype == dtype
    assert all(is_symmetric(K) for K in (A, P, square))
    assert torch.equal(one, P[1])
    assert len(launched) == 4


def test_large_tiles(launched, normal):
    from steepest.kernels.symmetric import LARGE, tiles

    d = LARGE + 6  # 45 tiles of 128
    assert tiles(d, "bfloat16").block > tiles(LARGE - 1, "bfloat16").block
    X = normal(1, d, 20, dtype=torch.bfloat16)
    with use("always"):
        A = gram(X)
    torch.testing.assert_close(A.double(), X.double() @ X.double().mT, rtol=1e-2, atol=1e-2)
    assert is_symmetric(A)


def test_every_tile_is_found(normal):
    """A square root turns a tile's number into its row and column: 210 small tiles, each exactly once."""
    from steepest.kernels.symmetric import Tiles, _launch

    X = normal(1, 20 * 16, 3)
    out = torch.full((1, 20 * 16, 20 * 16), torch.nan, device=X.device)
    _launch(out, None, X, X, 0.0, 1.0, "float32", Tiles(block=16, block_k=16, warps=4, stages=2))
    torch.testing.assert_close(out, X @ X.mT)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_stays_alone(launched, normal, bad):
    X, K = normal(3, 70, 20), symmetric(normal(3, 70, 5, seed=1))
    X[1, 3, 4] = bad
    with use("always"):
        alone = K[[0, 2]].clone()
        accumulate_gram(alone, X[[0, 2]], 0.9)
        accumulate_gram(K, X, 0.9)
    assert torch.equal(K[[0, 2]], alone)
    assert not torch.isfinite(K[1, 3]).any()
    assert not torch.isfinite(K[1, :, 3]).any()


def test_bits_are_the_same_alone_in_a_batch_and_again(launched, normal):
    X = normal(4, 100, 90)
    with use("always"):
        together, again = gram(X), gram(X)
        alone = torch.stack([gram(x) for x in X])
    assert torch.equal(together, again)
    assert torch.equal(together, alone)


def test_what_was_there_counts_only_below_the_diagonal_and_not_at_all_without_decay(launched, normal):
    X, K = normal(1, 70, 20), symmetric(normal(1, 70, 5, seed=1))
    with use("always"):
        expected = K.tril() + K.tril(-1).mT
        accumulate_gram(expected, X, 0.5)
        half = K.tril() + torch.full_like(K, torch.nan).triu(1)
        accumulate_gram(half, X, 0.5)
        assert torch.equal(half, expected)
        unknown = torch.full_like(K, torch.nan)
        accumulate_gram(unknown, X, 0.0)
    torch.testing.assert_close(unknown, X @ X.mT, **CLOSE[torch.float32])


def test_slots_of_a_stack(launched, normal):
    K, X = torch.zeros_like(normal(4, 40, 40)), normal(2, 3, 40, 30)[:, 1]
    with use("always"):
        accumulate_gram(K[1:3], X, 0.0)
    torch.testing.assert_close(K[1:3], X @ X.mT, **CLOSE[torch.float32])
    assert not K[0].any()
    assert not K[3].any()


def test_zero_gives_zero(launched, normal):
    zero = torch.zeros_like(normal(2, 40, 30))
    with use("always"):
        assert not gram(zero).any()
    assert launched


@pytest.mark.parametrize(("shape", "dtype"), pairs([(2, 70, 80), (1, 80, 70), (2, 40, 160), (160, 40)], CLOSE), ids=str)
def test_newton_schulz(launched, normal, shape, dtype):
    G, method = normal(*shape), "polar_express_5"
    with use("always"):
        ours = polar_factor(G, method, dtype=dtype)
    assert launched
    with use("never"):
        twins = polar_factor(G, method, dtype=dtype)
    exact = polar_factor(G.double(), method)
    error, allowed = ((result - exact).norm() for result in (ours, twins))
    # The interpreter cuts float32 to bfloat16, where GPUs round to nearest: a bias of half a unit at every step.
    factor = 5.0 if kernels.INTERPRETED and dtype == torch.bfloat16 else 1.5
    assert error < max(factor * allowed, 1e-4 * exact.norm())


def test_tf32_on_a_gpu(launched, normal, device):
    if device.type == "cpu":
        pytest.skip("TF32 is a GPU's")
    from steepest.linalg.precision import fp32_matmul_precision

    X = normal(2, 300, 200)
    with use("always"), fp32_matmul_precision("high"):
        assert kernels.product_precision(X) == "tf32"
        A, B = gram(X), gram(X.mT)
    for product, factor in ((A, X.double()), (B, X.mT.double())):
        exact = factor @ factor.mT
        assert 1e-6 < (product - exact).norm() / exact.norm() < 2e-3
        assert is_symmetric(product)


def test_inside_torch_compile(launched, normal):
    X, K = normal(1, 40, 20), torch.zeros_like(normal(1, 40, 40))

    @torch.compile(backend="eager")
    def feed(K, X):
        accumulate_gram(K, 2 * X, 0.0)
        return K + 1

    with use("always"):
        result = feed(K, X)
    torch.testing.assert_close(result, 4 * X @ X.mT + 1, **CLOSE[torch.float32])
    assert launched
