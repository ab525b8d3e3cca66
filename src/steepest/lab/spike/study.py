"""What one gradient, a thousand times too large, does to the eigenbases of KL-Shampoo's covariances.

A study of one matrix, whose gradients are drawn and do not depend on its weight. It follows L, the covariance of the
matrix' rows, and its eigenbasis Q_L: for the same gradients at two precisions, "high" (TF32, emulated where the device
has none) and "highest" (float32), by two solvers, under three guards against the spike. L is the covariance itself, not
in its eigenbasis. docs/spike.md explains the findings.

  G       [T, m, n]  gradients of T steps
  L, Q_L  [T, m, m]  covariance and eigenbasis after each step
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from steepest.linalg.eigenbasis import conjugate
from steepest.linalg.precision import fp32_matmul_precision, has_tf32, tf32_emulated
from steepest.optimizers.soap import SOAP
from steepest.rules.parts import kronecker
from steepest.rules.soap import Soap

SOLVERS = ("SOAP-KL", "REKLS")
"""One orthogonal iteration a step, and a full eigendecomposition."""
GUARDS = {"absolute": "absolute eps", "relative": "relative floor", "clipped": "floor, clipped"}
"""Lower bounds on what the whitening divides by; "clipped" also clips gradients to the norm of the first."""
GRADIENTS = ("isotropic", "directional")
"""Independent normal entries, whose covariance prefers no direction, and a few strong directions on either side."""

EPS: float = Soap.defaults()["eps"]
FLOOR: float = Soap.defaults()["kl_floor"]
STRONG = (15.0, 10.0)
"""Scales of the strongest and the weakest strong direction of directional gradients; the others have scale 1."""


@dataclass(frozen=True)
class Setup:
    """Sizes and times of the study. Steps count from 0."""

    shape: tuple[int, int] = (128, 64)
    steps: int = 100
    spike_at: int = 50
    scale: float = 1000.0
    top: int = 8
    """Number of leading eigenvectors that are followed, and of strong directions in directional gradients."""
    seed: int = 0
    device: str = "cpu"

    @property
    def emulated(self) -> bool:
        """Whether TF32 is emulated on this device."""
        return not has_tf32(self.device)


@dataclass(frozen=True)
class Case:
    """A solver, a guard and a kind of gradients, which are followed at each precision."""

    solver: str
    guard: str
    gradients: str = "isotropic"
    floor: float = FLOOR
    """The relative floor, unless the guard is absolute."""

    @property
    def kl_floor(self) -> float:
        """The optimizer's option of this name; 0 means the absolute eps."""
        return 0.0 if self.guard == "absolute" else self.floor


@dataclass(frozen=True)
class Path:
    """The covariance, its basis and the updates along one run, on the CPU."""

    Q: Tensor
    """``[T, m, m]``: eigenbasis of L."""
    L: Tensor
    """``[T, m, m]``: covariance of the rows."""
    lost: Tensor
    """``[T, 2]``: how many Rayleigh quotients of L and of R lie at or below the floor for the next step. With the
    absolute eps each of these becomes a weight of 1/eps."""
    smallest: Tensor
    """``[T, 2]``: the smallest Rayleigh quotient of L and of R, relative to the largest."""
    update_rms: Tensor
    """``[T]``: root mean square of the update, in learning rates."""


def draw(gradients: str, setup: Setup) -> tuple[Tensor, Tensor | None]:
    """Draw the gradients ``[T, m, n]``, with the spike, and return the leading eigenvectors ``[m, top]`` too, if any.

    Directional gradients are ``A Z Bᵀ`` with normal Z, so KL-Shampoo's L should become proportional to ``A Aᵀ``. The
    covariance of isotropic gradients has no leading eigenvectors. Drawn on the CPU, they are the same for all devices.
    """
    generator = torch.Generator().manual_seed(setup.seed)
    G = torch.randn(setup.steps, *setup.shape, generator=generator)  # [T, m, n]
    G[setup.spike_at] *= setup.scale
    if gradients == "isotropic":
        return G, None
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in setup.shape)
    strong = torch.linspace(*STRONG, setup.top)
    A, B = (X * torch.cat([strong, torch.ones(len(X) - setup.top)]) for X in (U, V))
    return A @ G @ B.mT, U[:, : setup.top]


def follow(case: Case, precision: str, setup: Setup) -> Path:
    """Run one case at one precision, and return its path."""
    device = torch.device(setup.device)
    G, _ = draw(case.gradients, setup)
    W = torch.zeros(setup.shape, device=device, requires_grad=True)
    optimizer = SOAP(
        [W],
        lr=1.0,
        betas=(0.9, 0.95),
        shampoo_beta=0.95,
        weight_decay=0.0,
        precondition_frequency=1,
        use_eigh=case.solver == "REKLS",
        kl_floor=case.kl_floor,
        fp32_matmul_prec=precision,
    )
    # Set after the state was allocated, so that L and R are the covariances themselves and not in their eigenbases, and
    # their Rayleigh quotients are computed by a product, as in the formula.
    optimizer.param_groups[0]["use_kl_shampoo"] = True
    limit = torch.linalg.matrix_norm(G[0]).item() if case.guard == "clipped" else float("inf")
    m = setup.shape[0]
    path = Path(
        Q=torch.empty(setup.steps, m, m),
        L=torch.empty(setup.steps, m, m),
        lost=torch.empty(setup.steps, 2, dtype=torch.int64),
        smallest=torch.empty(setup.steps, 2),
        update_rms=torch.empty(setup.steps),
    )
    with tf32_emulated() if setup.emulated else nullcontext():
        for i in range(setup.steps):
            W.grad = G[i].to(device)
            torch.nn.utils.clip_grad_norm_([W], limit)
            before = W.detach().clone()
            optimizer.step()
            state = optimizer.state[W]
            path.Q[i], path.L[i] = state["Q_L"], state["L"]
            path.update_rms[i] = (W.detach() - before).square().mean().sqrt()
            for k, side in enumerate("LR"):
                with fp32_matmul_precision(precision):
                    quotients = conjugate(state[side], state[f"Q_{side}"], diag=True)
                path.lost[i, k] = lost(quotients, case.kl_floor)
                path.smallest[i, k] = quotients.min() / quotients.max()
    return path


def lost(quotients: Tensor, kl_floor: float) -> Tensor:
    """Return how many of the quotients lie at or below the floor.

    >>> quotients = torch.tensor([1.0, 1e-5, -1e-9])
    >>> lost(quotients, 0.0).item(), lost(quotients, 1e-4).item()
    (1, 2)
    """
    return (quotients <= (kl_floor * quotients.max() if kl_floor else EPS)).sum()


@contextmanager
def quotients_at(precision: str) -> Iterator[None]:
    """Compute the Rayleigh quotients in KL-Shampoo's update of the covariances at a precision of their own.

    They come from one product, K Q. The precision of everything else is unchanged.
    """

    def at(a: Tensor, p: Tensor, diag: bool = False) -> Tensor:
        with fp32_matmul_precision(precision):
            return conjugate(a, p, diag)

    with mock.patch.object(kronecker, "conjugate", at):
        yield
