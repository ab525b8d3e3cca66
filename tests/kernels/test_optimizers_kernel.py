"""Optimizers on the device of the kernels: the contract, steps as on a CPU, and no wait for the device."""

from functools import partial

import long
import pytest
import torch

from steepest import kernels, testing
from steepest.engine.optimizer import Optimizer

PERIOD = 4
SOAP = {"rule": "soap", "lr": 3e-3, "precondition_frequency": PERIOD}
OPTIMIZERS = {
    "soap": SOAP,
    "kl": {**SOAP, "use_kl_shampoo": True},
    "one-sided": {**SOAP, "max_precond_dim": 256},
    "staggered": {**SOAP, "stagger": True},
    "moso": {"rule": "moso", "lr": 1e-3},
    "muon": {"rule": "muon", "lr": 2e-2},
    "adamw": {"rule": "adamw", "lr": 1e-3},
}
NAMES = pytest.mark.parametrize("name", list(OPTIMIZERS))
CHAPTERS = (12,) if kernels.INTERPRETED else (5, 7, 11, 12)
"""Side effects, resuming, GradScaler, and gradients that are not finite; the last alone where kernels are slow."""
CLAUSES = [name for name, clause in testing.CLAUSES.items() if clause.number in CHAPTERS and not clause.slow]
QUICK = ("nan_gradient", "bad_gradient_isolated")
SIDES = (24, 24, 17) if kernels.INTERPRETED else (512, 512, 300)
"""Matrices are square: where a first gradient leaves eigenvalues at zero, rounding decides for one of many bases."""


class Training:
    """Matrices on a device, their optimizer, and gradients that only a step's number decides."""

    def __init__(self, options, device):
        self.device = device
        self.params = [torch.nn.Parameter(self.normal((d, d), i)) for i, d in enumerate(SIDES)]
        self.optimizer = Optimizer(self.params, **options)

    def normal(self, shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def step(self, number):
        for i, p in enumerate(self.params):
            p.grad = self.normal(p.shape, 1000 * number + i)
        self.optimizer.step()


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        pytest.param(name, clause, marks=() if name == "soap" and clause in QUICK else long.marks)
        for name in OPTIMIZERS
        for clause in CLAUSES
    ],
)
def test_the_contract_is_kept(device, name, clause):
    with kernels.use("always"):
        report = testing.check_optimizer(partial(Optimizer, **OPTIMIZERS[name]), device=device, only=[clause])
    assert report.ok, report


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if mode == "always" or name == "soap" else long.marks)
        for name in OPTIMIZERS
        for mode in ("auto", "always")
    ],
)
def test_steps_are_those_on_a_cpu(device, name, mode):
    options = OPTIMIZERS[name] | ({"solver": "first_order"} if OPTIMIZERS[name]["rule"] == "soap" else {})
    here, there = Training(options, device), Training(options, torch.device("cpu"))
    start = [p.detach().clone() for p in there.params]
    for number in range(1, PERIOD + 3):
        with kernels.use(mode):
            here.step(number)
        with kernels.use("never"):
            there.step(number)
    limit = 0.3 if name == "muon" else 0.05  # Muon multiplies in bfloat16 on a GPU
    for p, q, W in zip(here.params, there.params, start, strict=True):
        assert (p.detach().cpu() - q.detach()).norm() <= limit * (q.detach() - W).norm()


@NAMES
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_without_a_refresh_does_not_wait_for_the_device(device, name):
    if name in ("moso", "staggered"):
        pytest.skip("refreshes at every step")
    training = Training(OPTIMIZERS[name], device)
    for number in range(1, 3 * PERIOD + 1):  # the first steps allocate, compile, and refresh everything once
        quiet = number > PERIOD + 1 and number % PERIOD != 1
        for i, p in enumerate(training.params):
            p.grad = training.normal(p.shape, 1000 * number + i)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error" if quiet else before)
        try:
            training.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
