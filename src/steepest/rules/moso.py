"""MOSO: one-sided SOAP on Muon's momentum.

Momentum first, then Adam in the eigenbasis of the momentum's covariance, on the smaller side only: Muon's direction at
SOAP's fidelity for little more than Muon's memory. Khona, Emerging-Optimizers, 2025. Checked against its authors'
numbers in tests/reference/test_moso.py. For m <= n (the other side likewise, with Mᵀ M):

  M    [B, m, n]  momentum of the gradients            state: momentum_buffer
  C    [B, m, m]  covariance of the momentum, E[M Mᵀ]  state: L  (R where n < m)
  Q    [B, m, m]  its eigenvectors                     state: Q_L (Q_R)
  exp_avg, exp_avg_sq  [B, m, n]  Adam's moments of Qᵀ M
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.precision import fp32_matmul_precision
from steepest.rule import Rule, State, Step, at_least, beta, betas, lays_out, one_of, revive
from steepest.rule.words import MosoInner, Precision
from steepest.rules.parts.factors import Factors
from steepest.rules.parts.moments import adam, clip_rms, corrected_beta


@dataclass(frozen=True, kw_only=True)
class Moso(Rule):
    """Options as `steepest.MOSO` describes them."""

    name: ClassVar[str] = "moso"
    paper: ClassVar[str] = "Khona, Emerging-Optimizers, 2025"

    momentum: float = beta(0.95)
    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = beta(0.95)
    eps: float = at_least(0, 1e-8)
    inner: MosoInner = lays_out(one_of(MosoInner, "adam"))
    power_iter_steps: int = at_least(1, 1)
    noise_floor: float = at_least(0, 3e-4)
    max_update_rms: float = at_least(0, 0.0, "0: no limit")
    fp32_matmul_prec: Precision = one_of(Precision, "highest")
    qr_fp32_matmul_prec: Precision = one_of(Precision, "high")
    max_precond_dim: int = lays_out(at_least(0, 8192))

    def init(self, G: Tensor) -> State:
        state = {"momentum_buffer": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)}  # [B, m, n]
        if self.inner == "adam":
            state["exp_avg"] = torch.zeros_like(G)
        smaller = min(G.shape[1:])
        factors = Factors.init(G, max_precond_dim=min(smaller, self.max_precond_dim))
        if G.shape[1] == G.shape[2]:  # the rows' side serves a square matrix
            factors = {name: K for name, K in factors.items() if name in ("L", "Q_L")}
        return state | factors

    def update(self, G: Tensor, state: State, step: Step) -> Tensor:
        G = G if step.penalty is None else G + step.penalty
        with fp32_matmul_precision(self.fp32_matmul_prec):
            M = state["momentum_buffer"].lerp_(G, 1 - self.momentum)
            revive(state)
            factors = Factors(state, step.failures)
            if not factors.identity:
                factors.accumulate(M, corrected_beta(self.shampoo_beta, step.t))
                with fp32_matmul_precision(self.qr_fp32_matmul_prec):
                    if step.stage == "first":
                        factors.start(slice(None), in_float64=True)
                    else:
                        factors.refresh(slice(None), steps=self.power_iter_steps)
            projected = factors.project(M)  # Qᵀ M
            if self.inner == "adam":
                u = adam(projected, state, step.t, self.betas, self.eps, noise_floor=self.noise_floor)
            else:  # momentum is in M already: Adam's own would damp a second time
                v = state["exp_avg_sq"].mul_(self.betas[1]).addcmul_(projected, projected, value=1 - self.betas[1])
                u = projected / (v.sqrt() + self.eps)
            return clip_rms(factors.unproject(u), self.max_update_rms)

    def stage(self, clock: int) -> str:
        return "first" if clock == 0 else "steady"
