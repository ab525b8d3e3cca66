"""SOAP: Adam, run in the eigenbasis of Shampoo's two covariances.

Vyas et al., arXiv:2409.11321, Algorithm 3; with ``use_kl_shampoo`` the covariances are those of Lin et al.,
arXiv:2509.03378. Checked against the authors' numbers in tests/reference/test_soap.py.

  G                    [B, m, n]             gradients
  L, R                 [B, m, m], [B, n, n]  covariances of rows and columns, E[G Gᵀ] and E[Gᵀ G]
  Q_L, Q_R             likewise              their eigenvectors, by descending eigenvalue
  exp_avg, exp_avg_sq  [B, m, n]             Adam's moments of the projected gradient Q_Lᵀ G Q_R
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.factors import Factors
from steepest.linalg.flops import eigh, iteration, product
from steepest.linalg.precision import PRECISIONS, fp32_matmul_precision
from steepest.moments import adam
from steepest.rule import (
    Refreshing,
    Slots,
    State,
    Step,
    at_least,
    beta,
    betas,
    checked,
    clip_rms,
    corrected_beta,
    one_of,
)

NOISE_FLOOR = 1e-2  # "auto": costs nothing in training, and makes first steps reproducible
SOLVERS = ("auto", "qr", "eigh")


@dataclass(frozen=True, kw_only=True)
class Soap(Refreshing):
    """Options as `steepest.SOAP` describes them."""

    name: ClassVar[str] = "soap"
    paper: ClassVar[str] = "Vyas et al., arXiv:2409.11321"

    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = beta(0.95)
    eps: float = at_least(0, 1e-8)
    nesterov: bool = False
    adam_warmup_steps: int = at_least(0, 0)
    correct_bias: bool = True
    correct_shampoo_beta_bias: bool | None = None
    fp32_matmul_prec: str = one_of(PRECISIONS, "highest")
    refresh: str = one_of(SOLVERS, "auto")
    match_columns: bool = True
    qr_fp32_matmul_prec: str = one_of(PRECISIONS, "high")
    power_iter_steps: int = at_least(1, 1)
    use_adaptive_criteria: bool = False
    adaptive_update_tolerance: float = at_least(0, 1e-7)
    max_update_rms: float = at_least(0, 0.0, "0: no limit")
    use_kl_shampoo: bool = False
    kl_floor: float = checked(1e-4, lambda x: 0 <= x < 1, "in [0, 1); 0 means the absolute eps")
    basis_timing: str = one_of(("before", "after"), "before")
    noise_floor: float | str = checked(
        "auto", lambda x: x == "auto" or (isinstance(x, int | float) and x >= 0), '"auto" or a number >= 0'
    )
    momentum_floor: bool = True
    precondition_1d: bool = False

    def init(self, G: Tensor) -> State:
        moments = {"exp_avg": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)}  # [B, m, n]
        return moments | Factors.init(G, self.max_precond_dim, self.precondition_1d)

    def update(self, G: Tensor, state: State, step: Step) -> Tensor | None:
        with fp32_matmul_precision(self.fp32_matmul_prec):
            if self.basis_timing == "before":  # the basis knows the gradient that it projects
                self.learn(G, state, step)
                return self.act(G, state, step, in_basis=step.stage != "warmup")
            seeding = step.stage == "first" and self.seeds
            D = None if seeding else self.act(G, state, step, in_basis=step.stage == "steady")
            self.learn(G, state, step)
            return D

    def learn(self, G: Tensor, state: State, step: Step) -> None:
        """The covariances take the gradient in; where a refresh is due, the bases follow."""
        factors = Factors(state, step.failures)
        if factors.trivial:
            return
        beta = self.factor_beta(step.t)
        if self.use_kl_shampoo:
            factors.feed_kl(G, beta, self.eps, self.kl_floor)
        else:
            factors.feed(G, beta)
        if step.refresh is not None:
            with fp32_matmul_precision(self.qr_fp32_matmul_prec):
                self.follow(factors, step.refresh, first=step.stage == "first")

    def follow(self, factors: Factors, slots: Slots, first: bool) -> None:
        """The bases of these slots follow their covariances, and Adam's moments follow the bases."""
        if first and self.refresh != "qr":
            factors.start(slots, in_float64=self.basis_timing == "before")
            return
        if self.use_adaptive_criteria and not first:
            slots = factors.outdated(slots, self.adaptive_update_tolerance)
        factors.refresh(slots, self.refresh == "eigh", self.power_iter_steps, self.match_columns)

    def act(self, G: Tensor, state: State, step: Step, in_basis: bool) -> Tensor:
        """Adam's direction, taken in the eigenbases and brought back."""
        factors = Factors(state if in_basis else {})
        guarded = not factors.trivial
        g = factors.project(G if step.penalty is None else G + step.penalty)  # [B, m, n]
        u = adam(
            g,
            state,
            step.t - 1 if self.seeds else step.t,
            self.betas,
            self.eps,
            correct_bias=self.correct_bias,
            nesterov=self.nesterov,
            momentum_floor=self.momentum_floor and guarded,
            noise_floor=self.relative_noise if guarded else 0.0,
        )
        return clip_rms(factors.unproject(u), self.max_update_rms)

    def flops(self, m: int, n: int) -> float:
        """6mn(m+n): feed, project, unproject. With KL 2mn(m+n) more, and a product on each side, 2d³.

        At a refresh 4mn(m+n), to turn the momentum, and on each side a product and a QR decomposition, 2d³ + 8d³/3, or
        a full decomposition, 9d³. With one factor the other side's part of all this falls away.
        """
        sides = self.sides(m, n)
        along = sum(product(d, m, n) for d in sides)  # 2mn(m+n): one product on each side
        cubes = sum(product(d, d, d) for d in sides)
        every = 3 * along
        if self.use_kl_shampoo:
            every += cubes + (along if len(sides) == 2 else 0.0)
        refresh = 2 * along
        if self.refresh == "eigh":
            refresh += sum(map(eigh, sides)) + (cubes if self.match_columns else 0.0)
        else:
            refresh += sum(iteration(d, self.power_iter_steps) for d in sides)
        if self.use_adaptive_criteria:
            refresh += cubes
        return every + refresh / self.last_period

    @property
    def seeds(self) -> bool:
        """Whether a matrix's first gradient only seeds the factors and moves nothing, as the authors run it."""
        return self.basis_timing == "after" and self.adam_warmup_steps == 0

    @property
    def decay_follows(self) -> bool:
        return self.basis_timing == "after"

    @property
    def first_refresh(self) -> int:
        """The update in which the first basis comes: when the warm-up ends, before or after that step."""
        return self.adam_warmup_steps if self.basis_timing == "before" else max(self.adam_warmup_steps - 1, 0)

    @property
    def relative_noise(self) -> float:
        """The noise floor as a number."""
        return NOISE_FLOOR if isinstance(self.noise_floor, str) else self.noise_floor

    def factor_beta(self, t: Tensor) -> float | Tensor:
        """The factors' decay: shampoo_beta, or 1 - (1-b)/(1-b^t), which makes the average unbiased; 0 at t = 1."""
        corrects = self.correct_bias if self.correct_shampoo_beta_bias is None else self.correct_shampoo_beta_bias
        return corrected_beta(self.shampoo_beta, t) if corrects else self.shampoo_beta
