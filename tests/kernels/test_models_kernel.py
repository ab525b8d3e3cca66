"""Kernels at the sizes of models, against float64, their twins and themselves; at small sizes in the interpreter."""

import pytest
import torch
from long import pairs

from steepest import kernels
from steepest.kernels import use
from steepest.linalg.precision import fp32_matmul_precision, has_tf32
from steepest.linalg.symmetric import accumulate_gram, gram, symmetric_product
from steepest.rules.parts.moments import adam

ROUNDING = {"float32": 2.0**-23, "tf32": 2.0**-11, "bfloat16": 2.0**-8}
PRECISIONS = pytest.mark.parametrize("precision", list(ROUNDING))
WORSE = 3.0
"""A kernel may be so many times as far from float64 as its twin, and a rounding further."""


def sized(*sizes):
    return tuple(min(size, 40) for size in sizes) if kernels.INTERPRETED else sizes


def compare(launched, work, exact, precision):
    """``work(which)`` computes the result for some matrices of the batch; ``exact`` is all of it in float64."""
    if precision == "tf32" and exact.is_cuda and not has_tf32(exact.device):
        pytest.skip("needs TF32")
    every = slice(None)
    with fp32_matmul_precision("high" if precision == "tf32" else "highest"):
        with use("never"):
            twin = work(every)
        with use("always"):
            result, again, alone = work(every), work(every), work(slice(-1, None))
    assert launched
    far, near = ((x.double() - exact).norm() / exact.norm() for x in (result, twin))
    assert near <= 16 * ROUNDING[precision]  # sums of many terms, in any order
    assert far <= WORSE * near + ROUNDING[precision]
    assert torch.equal(result, again)
    assert torch.equal(result[-1:], alone)


@pytest.mark.parametrize(
    ("matrices", "transposed", "precision"),
    pairs(
        [(12, 3072, 768), (12, 768, 3072), (3, 1000, 333), (1, 2048, 8192), (1, 8192, 2048)], [False, True], ROUNDING
    ),
    ids=str,
)
def test_a_covariance_takes_a_gradient_in(launched, normal, matrices, transposed, precision):
    batch, d, k = sized(*matrices)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    X = (normal(batch, k, d).mT if transposed else normal(batch, d, k)).to(dtype)
    K = (X.float() @ X.float().mT / k).to(dtype)
    K = K.tril() + K.tril(-1).mT

    def work(which):
        out = K[which].clone()
        accumulate_gram(out, X[which], 0.9)
        return out

    compare(launched, work, 0.9 * K.double() + (1 - 0.9) * X.double() @ X.double().mT, precision)


@PRECISIONS
def test_a_polynomial(launched, normal, precision):
    (d,) = sized(2048)
    with use("never"):
        A = gram(normal(2, d, d) / d**0.5)
    A = (A.tril() + A.tril(-1).mT).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    exact = -2 * A.double() + 0.5 * A.double() @ A.double()
    compare(launched, lambda which: symmetric_product(*[A[which]] * 3, beta=-2.0, alpha=0.5), exact, precision)


@pytest.mark.parametrize("shape", [(12, 3072, 768), (1, 2048, 8192), (3, 1001, 333)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_moments(launched, normal, shape, nesterov):
    shape = sized(*shape)
    g, m, v = normal(*shape), normal(*shape, seed=1), normal(*shape, seed=2).square()
    t = torch.arange(3.0, 3.0 + shape[0], device=g.device).view(-1, 1, 1)

    def work(which, dtype=torch.float32):
        state = {"exp_avg": m[which].to(dtype, copy=True), "exp_avg_sq": v[which].to(dtype, copy=True)}
        options = {"nesterov": nesterov, "momentum_floor": True, "noise_floor": 1e-2}
        D = adam(g[which].to(dtype), state, t[which].to(dtype), (0.9, 0.95), 1e-8, **options)
        return torch.cat([D, state["exp_avg"], state["exp_avg_sq"]], dim=-1)

    compare(launched, work, work(slice(None), torch.float64), "float32")
