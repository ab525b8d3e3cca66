"""What one gradient, a thousand times too large, does to the eigenbases of KL-Shampoo's covariances.

A study of one matrix. Its gradients are drawn, not computed: the weight goes nowhere, and L, the covariance of its
rows, is watched with its eigenbasis Q_L. The same gradients are followed at two precisions, "high" (TF32, emulated
where the device has none) and "highest" (float32), by two solvers, under three guards against the spike. L is the
covariance as the formula has it, not in its eigenbasis. docs/spike.md tells what comes out and why.

  G       [T, m, n]  the gradients of T steps
  L, Q_L  [T, m, m]  as they are after each step
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
from steepest.rule.words import Precision
from steepest.rules.parts import kronecker
from steepest.rules.soap import Soap

SOLVERS = ("SOAP-KL", "REKLS")
"""One orthogonal iteration a step, or a full eigendecomposition."""
GUARDS = {"absolute": "absolute eps", "relative": "relative floor", "clipped": "floor, clipped"}
"""What keeps the whitening from dividing by nothing; "clipped" also clips gradients to the norm of the first."""
GRADIENTS = ("isotropic", "directional")
"""Independent normal entries, whose covariance prefers no direction; or a few strong directions on either side."""

EPS: float = Soap.defaults()["eps"]
FLOOR: float = Soap.defaults()["kl_floor"]
STRONG = (15.0, 10.0)
"""The strongest and the weakest strong direction of directional gradients, beside 1 for the rest."""


@dataclass(frozen=True)
class Setup:
    """Sizes and times, by default those of the study that this one follows, cut short. Steps count from 0."""

    shape: tuple[int, int] = (128, 64)
    steps: int = 100
    spike_at: int = 50
    scale: float = 1000.0
    top: int = 8
    """How many leading eigenvectors are watched; and how many directions of directional gradients are strong."""
    seed: int = 0
    device: str = "cpu"

    @property
    def emulated(self) -> bool:
        """Whether TF32 is, on this device."""
        return not has_tf32(self.device)


@dataclass(frozen=True)
class Case:
    """One way to meet the spike; it is followed at each precision."""

    solver: str
    guard: str
    gradients: str = "isotropic"
    floor: float = FLOOR
    """Of the guards that are relative."""

    @property
    def kl_floor(self) -> float:
        """The option: 0 is the absolute eps."""
        return 0.0 if self.guard == "absolute" else self.floor


@dataclass(frozen=True)
class Path:
    """What was seen on the way, on the CPU."""

    Q: Tensor
    """``[T, m, m]``, the basis of L."""
    L: Tensor
    """``[T, m, m]``."""
    lost: Tensor
    """``[T, 2]``: how many Rayleigh quotients of L and of R the next step will find at or below the floor. Under the
    absolute eps each of them becomes a weight of 1/eps."""
    smallest: Tensor
    """``[T, 2]``: the smallest of them, relative to the largest."""
    update_rms: Tensor
    """``[T]``: root mean square of the weight's change, in learning rates."""


def draw(gradients: str, setup: Setup) -> tuple[Tensor, Tensor | None]:
    """The gradients ``[T, m, n]``, with the spike, and the leading eigenvectors ``[m, top]`` of their covariance.

    Directional ones are ``A Z Bᵀ`` with normal Z, so KL-Shampoo's L should become proportional to ``A Aᵀ``. Isotropic
    ones have no leading eigenvectors. All are drawn on the CPU: every device gets the same.
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


def follow(case: Case, precision: Precision, setup: Setup) -> Path:
    """The path of one case at one precision."""
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
    # Switched on once the state is laid out: so L and R are the covariances themselves, and what whitens is computed
    # from them by a product, as the formula has it.
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
    """How many of the quotients lie at or below the floor.

    >>> quotients = torch.tensor([1.0, 1e-5, -1e-9])
    >>> lost(quotients, 0.0).item(), lost(quotients, 1e-4).item()
    (1, 2)
    """
    return (quotients <= (kl_floor * quotients.max() if kl_floor else EPS)).sum()


@contextmanager
def quotients_at(precision: str) -> Iterator[None]:
    """Compute the quotients of KL-Shampoo's feed at a precision of their own, whatever the rest is computed at.

    They come from one product of the feed, K Q. Nothing else is changed.
    """

    def at(a: Tensor, p: Tensor, diag: bool = False) -> Tensor:
        with fp32_matmul_precision(precision):
            return conjugate(a, p, diag)

    with mock.patch.object(kronecker, "conjugate", at):
        yield
