import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.linalg.roots import cholesky, inverse, matrix_power


def covariance(*batch, d, rank, seed=0, scale=1.0):
    A = torch.randn(*batch, d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scale * A @ A.mT


@given(
    d=st.integers(1, 16),
    rank=st.integers(0, 16),
    root=st.integers(1, 6),
    scale=st.floats(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_inverse_roots_undo_their_matrix_where_it_acts(d, rank, root, scale, seed):
    K = covariance(d=d, rank=min(rank, d), seed=seed, scale=10**scale)
    P = torch.eye(d, dtype=K.dtype)
    for _ in range(root):
        P = P @ matrix_power(K, -1 / root)
    torch.testing.assert_close(K @ P @ K, K, rtol=1e-5, atol=1e-7 * float(K.abs().max()))
    torch.testing.assert_close(P, P.mT, rtol=0, atol=1e-6 * float(P.abs().max()))


@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.25, 0.5, 2.0])
def test_batches_and_damping(exponent):
    K = covariance(2, 3, d=5, rank=5)
    damped = matrix_power(K, exponent, eps=0.1)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(damped[i, j], matrix_power(K[i, j], exponent, eps=0.1))
            torch.testing.assert_close(
                damped[i, j], matrix_power(K[i, j] + 0.1 * torch.eye(5, dtype=K.dtype), exponent), rtol=1e-9, atol=1e-9
            )


def test_relative_damping_knows_no_unit():
    K = covariance(2, d=6, rank=3)
    small, large = (matrix_power(scale * K, -0.25, eps=1e-6, relative=True) for scale in (1.0, 1e8))
    torch.testing.assert_close(large, small * 1e8**-0.25)


@pytest.mark.parametrize("exponent", [-0.5, -0.25, 0.5])
@pytest.mark.parametrize("relative", [False, True])
def test_zero_gives_zero_or_its_damping(exponent, relative):
    K = torch.zeros(2, 3, 3)
    assert not matrix_power(K, exponent, relative=relative).any()
    damped = matrix_power(K, exponent, eps=1e-4, relative=relative)
    expected = torch.zeros(3, 3) if relative else 1e-4**exponent * torch.eye(3)
    torch.testing.assert_close(damped, expected.expand(2, 3, 3))


def test_rounding_below_zero_is_not_amplified():
    K = torch.diag(torch.tensor([1.0, -1e-9, 1e-9]))
    torch.testing.assert_close(matrix_power(K, -0.5), torch.diag(torch.tensor([1.0, 0.0, 0.0])))


@pytest.mark.parametrize("d", [5, 512])
def test_an_inverse_is_that_of_the_damped_matrix_and_leaves_the_matrix_alone(d):
    X = torch.randn(2, d, 2 * d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    K, damping = X @ X.mT / (2 * d), torch.tensor([[[0.1]], [[2.0]]], dtype=torch.float64)
    kept = K.clone()
    found = inverse(K, damping)
    assert torch.equal(K, kept)
    torch.testing.assert_close(found, torch.inverse(K + damping * torch.eye(d, dtype=K.dtype)), rtol=1e-9, atol=1e-11)
    K[1, 0, 0] = -9.0
    found = inverse(K, damping)
    assert found.isnan().flatten(1).all(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_is_torchs_in_the_memory_of_its_argument(batch, dtype):
    K = covariance(*batch, d=20, rank=30).to(dtype)
    expected, there = torch.linalg.cholesky_ex(K)[0], K.data_ptr()
    L, info = cholesky(K)
    rounding = 20 * torch.finfo(dtype).eps  # libraries may factorize the upper triangle in another order than the lower
    torch.testing.assert_close(L, expected, rtol=rounding, atol=rounding)
    assert L.data_ptr() == there
    assert info.shape == batch
    assert not info.any()


def test_cholesky_reports_what_is_not_definite():
    K = torch.eye(4).repeat(2, 1, 1)
    K[1, 2, 2] = -1
    assert cholesky(K)[1].tolist() == [0, 3]


@pytest.mark.parametrize("d", [3, 130, 512])
def test_inverses_are_symmetric_to_the_last_bit_by_rows_and_leave_their_matrix(d):
    K = covariance(2, d=d, rank=d + 5).float() / d
    before = K.clone()
    P = inverse(K, damping=1.0)
    assert torch.equal(P, P.mT)
    assert P.stride(-1) == 1
    assert torch.equal(K, before)
    torch.testing.assert_close(P, torch.linalg.inv(K.double() + torch.eye(d)).float(), rtol=0, atol=1e-5)
