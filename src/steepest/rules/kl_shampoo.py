"""KL-Shampoo: Shampoo with the covariances that minimize a Kullback-Leibler divergence.

    L ← β L + (1-β) G R⁻¹ Gᵀ / n,  R ← β R + (1-β) Gᵀ L⁻¹ G / m        each side sees what the other has whitened
    D = L^p M R^p                                                      p = -1/2

Lin et al., arXiv:2509.03378. All else is Shampoo's; see `steepest.rules.shampoo` for the legend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steepest.linalg.symmetric import accumulate_gram
from steepest.linalg.whitening import root_mean_square, whitening_weights
from steepest.rule import Step, checked, number
from steepest.rules.parts.factors import SIDES, Factors, into
from steepest.rules.shampoo import RootsInBasis


@dataclass(frozen=True, kw_only=True)
class KLShampoo(RootsInBasis):
    """Options as `steepest.KLShampoo` describes them."""

    name: ClassVar[str] = "kl_shampoo"
    paper: ClassVar[str] = "Lin et al., arXiv:2509.03378"

    exponent: float | None = checked(
        -0.5, lambda p: p is None or (number(p) and p < 0), "a number < 0, or None for -1/(2 · factors)"
    )
    kl_floor: float = checked(1e-4, lambda x: number(x) and 0 <= x < 1, "in [0, 1); 0 means the absolute eps")

    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        G = factors.gradient = G if step.penalty is None else G + step.penalty
        state, beta, rms = factors.state, self.factor_beta(step.t), root_mean_square(G)
        Q_L, Q_R, (m, n) = state.get("Q_L"), state.get("Q_R"), G.shape[1:]
        rows, columns = into(G, Q_L, None), into(G, None, Q_R)  # Q_Lᵀ G and G Q_R
        energy = (into(columns, Q_L, None) if Q_R is None or m < n else into(rows, None, Q_R)).square()  # [B, m, n]
        λ = {side: state[f"lambda_{side}"] for side, _ in SIDES if side in state}  # [B, d]
        weights = {side: whitening_weights(x, rms, self.eps, -1.0, self.kl_floor) for side, x in λ.items()}
        for side, other, half, entries in (("L", "R", columns, energy), ("R", "L", rows.mT, energy.mT)):
            if side in λ:
                if other in λ:  # in its eigenbasis, whitening by the other side is scaling
                    half = half * weights[other].sqrt().unsqueeze(-2)
                    entries = entries * weights[other].unsqueeze(-2)
                accumulate_gram(state[side], half, beta, scale=1 / half.shape[-1])
                λ[side].lerp_(entries.sum(dim=-1) / half.shape[-1], (1 - beta).squeeze(-1))
