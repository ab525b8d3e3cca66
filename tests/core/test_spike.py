"""Eigenbases around a gradient spike: the study of SOAP-KL and REKLS runs, and the relative floor keeps its promise."""

import pytest
import torch

from steepest import SOAP
from steepest.linalg.precision import tf32_emulated

M, N, SPIKE_AT, STEPS, TOP = 32, 16, 20, 40, 4


def bases(use_eigh: bool, precision: str, **options):
    """Q_L after each step of i.i.d. Gaussian gradients with one a thousand times as large."""
    generator = torch.Generator().manual_seed(0)
    param = torch.zeros((M, N), requires_grad=True)
    opt = SOAP(
        [param], lr=1.0, betas=(0.9, 0.95), shampoo_beta=0.95, weight_decay=0.0, use_kl_shampoo=True,
        precondition_frequency=1, use_eigh=use_eigh, fp32_matmul_prec=precision, **options,
    )  # fmt: skip
    trajectory, spectra = torch.empty(STEPS, M, M), []
    for i in range(STEPS):
        param.grad = torch.randn((M, N), generator=generator) * (1000.0 if i == SPIKE_AT else 1.0)
        opt.step()
        trajectory[i] = opt.state[param]["Q_L"].detach().cpu()
        spectra.append(torch.linalg.eigvalsh(opt.state[param]["L"].detach()))
    return trajectory, torch.stack(spectra)


def angle(Q, reference):
    """The largest principal angle between two leading subspaces, in degrees."""
    sigmas = torch.linalg.svdvals(Q[:, :TOP].T @ reference[:, :TOP]).clamp(max=1.0)
    return sigmas.min().arccos().rad2deg().item()


@pytest.mark.parametrize("use_eigh", [False, True], ids=["soap-kl", "rekls"])
def test_the_study_runs_and_precisions_agree_where_there_is_no_tf32(use_eigh):
    high, spectra = bases(use_eigh, "high")
    highest, _ = bases(use_eigh, "highest")
    assert torch.equal(high, highest)
    assert spectra.isfinite().all()
    eye = torch.eye(M)
    assert max((Q.T @ Q - eye).abs().max() for Q in high) < 1e-5
    before, after = high[SPIKE_AT - 1], high[SPIKE_AT]
    assert angle(before, before) < 1.0
    assert angle(after, before) > 10.0, "the spike's directions lead the basis at once"


def test_the_absolute_eps_starts_the_covariances_1e8_too_large():
    """Zero factors give weights of 1/eps, and 20 steps later L still is the first gradient and does not turn."""
    absolute, spectra = bases(True, "highest", kl_floor=0.0)
    _, relative = bases(True, "highest", kl_floor=1e-4)
    assert spectra[0].max() > 1e7
    assert spectra[SPIKE_AT - 1].max() > 1e5
    assert relative[SPIKE_AT - 1].max() < 100
    assert angle(absolute[SPIKE_AT - 1], absolute[SPIKE_AT - 6]) < 1.0


@pytest.mark.parametrize("use_eigh", [False, True], ids=["soap-kl", "rekls"])
def test_in_their_eigenbases_covariances_have_quotients_that_tf32_does_not_lose(use_eigh):
    """If quotients are computed by a product, the basis jumps; tests/lab/test_spike.py tests that."""
    with tf32_emulated():
        high, _ = bases(use_eigh, "high", kl_floor=0.0)
    assert max(angle(Q, high[SPIKE_AT - 1]) for Q in high[SPIKE_AT - 10 :]) < 1.0
