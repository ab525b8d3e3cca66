"""SOAP: Adam, run in the eigenbasis of Shampoo's two covariances.

    L ← β L + (1-β) G Gᵀ,  R ← β R + (1-β) Gᵀ G
    Q_L, Q_R ← their eigenvectors, where a refresh is due
    D = Q_L Adam(Q_Lᵀ G Q_R) Q_Rᵀ

Vyas et al., arXiv:2409.11321, Algorithm 3. Checked against the authors' numbers in tests/reference/test_soap.py.

  G         [B, m, n]             gradients
  L, R      [B, m, m], [B, n, n]  covariances of rows and columns, E[G Gᵀ] and E[Gᵀ G]
  Q_L, Q_R  [B, m, m], [B, n, n]  their eigenvectors, by descending eigenvalue
  m, v      [B, m, n]             Adam's moments of the projected gradient     state: exp_avg, exp_avg_sq
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.rule import Refreshing, Slots, State, Step, at_least, beta, betas, flag, frequency, lays_out, one_of
from steepest.rule.words import BasisDtype, BasisTiming, MomentDtype, Precision, Solver
from steepest.rules.parts.factors import F, Factors
from steepest.rules.parts.moments import adam, clip_rms, corrected_beta


@dataclass(frozen=True, kw_only=True)
class AdamInBasis(Refreshing[F], ABC):
    """Adam in the eigenbases of two covariances; a subclass says of which covariances."""

    averages: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "L", "R", "failures")
    precondition_frequency: int | Callable[[int], int] = frequency(5)
    precondition_1d: bool = lays_out(flag(False))
    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = beta(0.95)
    eps: float = at_least(0, 1e-8)
    nesterov: bool = flag(False)
    adam_warmup_steps: int = at_least(0, 0)
    correct_bias: bool = flag(True)
    correct_shampoo_beta_bias: bool | None = flag(None)
    qr_fp32_matmul_prec: Precision = one_of(Precision, "high")
    solver: Solver = one_of(Solver, "auto")
    power_iter_steps: int = at_least(1, 1)
    match_columns: bool = flag(True)
    use_adaptive_criteria: bool = flag(False)
    adaptive_update_tolerance: float = at_least(0, 1e-7)
    max_update_rms: float = at_least(0, 0.0, "0: no limit")
    noise_floor: float = at_least(0, 1e-2)  # makes first steps reproducible, and fades out
    momentum_floor: bool = flag(True)
    basis_timing: BasisTiming = one_of(BasisTiming, "before")
    refresh_async: bool = flag(False)
    basis_dtype: BasisDtype = lays_out(one_of(BasisDtype, "float32"))
    moment_dtype: MomentDtype = lays_out(one_of(MomentDtype, "float32"))

    def init(self, G: Tensor) -> State:
        moments = {"exp_avg": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)}  # [B, m, n]
        return moments | Factors.init(G, self.max_precond_dim, self.precondition_1d)

    def factor_beta(self, step: Step) -> float | Tensor:
        corrects = self.correct_bias if self.correct_shampoo_beta_bias is None else self.correct_shampoo_beta_bias
        beta = corrected_beta(self.shampoo_beta, step.t) if corrects else self.shampoo_beta
        return beta if step.lost is None else step.decay(beta)

    def update_bases(self, factors: F, slots: Slots, step: Step) -> None:
        if step.stage == "first" and self.solver != "qr":
            return factors.start(slots, self.basis_timing == "before", gradients=self.first_refresh + 1)
        if self.use_adaptive_criteria and step.stage != "first":
            slots = factors.outdated(slots, self.adaptive_update_tolerance)
        factors.refresh(slots, self.solver, self.power_iter_steps, self.match_columns)

    def direction(self, G: Tensor, factors: F, step: Step) -> Tensor:
        rotates = self.has_bases(step) and not factors.identity
        G = G if step.penalty is None else G + step.penalty
        u = adam(
            factors.project(G) if rotates else G,  # [B, m, n]
            *(factors.state, step.t - 1 if self.seeds else step.t, self.betas, self.eps, step.lost),
            correct_bias=self.correct_bias,
            nesterov=self.nesterov,
            momentum_floor=self.momentum_floor and rotates,
            noise_floor=self.noise_floor if rotates else 0.0,
        )
        return clip_rms(factors.unproject(u) if rotates else u, self.max_update_rms)


@dataclass(frozen=True, kw_only=True)
class Soap(AdamInBasis[Factors]):
    """Options as `steepest.SOAP` describes them."""

    name: ClassVar[str] = "soap"
    paper: ClassVar[str] = "Vyas et al., arXiv:2409.11321"

    def factors(self, state: State, step: Step) -> Factors:
        return Factors(state, step.failures)

    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        factors.accumulate(G, self.factor_beta(step))
