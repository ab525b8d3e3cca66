"""Adam's direction between two inverse roots: a formula that circulates under SOAP's name, and is not SOAP.

    W ← W - lr · L^(-1/root) Adam(G) R^(-1/root)        L = E[G Gᵀ], R = E[Gᵀ G]

Adam already divides by the gradient's size, and the roots do it again: gradients 100 times as large give updates 100
times as small (root = 4). ``graft="adam"`` gives each matrix the norm of Adam's own direction back, which leaves the
roots only the say in its direction. Memory is O(m² + n²) beside Adam's. `steepest.InverseRootSOAP` runs it; checked in
tests/reference/test_inverse_root.py.

  G                    [B, m, n]             gradients
  L, R                 [B, m, m], [B, n, n]  covariances of rows and columns
  P_L, P_R             [B, m, m], [B, n, n]  their inverse roots, of the last refresh
  exp_avg, exp_avg_sq  [B, m, n]             Adam's moments of G
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steepest.linalg.roots import matrix_power
from steepest.rule import Refreshing, Slots, State, Step, at_least, beta, betas, flag, lays_out, one_of
from steepest.rules.parts.factors import SIDES, Factors, into
from steepest.rules.parts.moments import adam, clip_rms, corrected_beta
from steepest.rules.parts.scales import frobenius, with_norm


@dataclass(frozen=True, kw_only=True)
class InverseRoot(Refreshing[Factors]):
    """Options as `steepest.InverseRootSOAP` describes them."""

    name: ClassVar[str] = "inverse_root"
    paper: ClassVar[str] = "none: a formula that goes by SOAP's name"

    precondition_1d: bool = lays_out(flag(False))
    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = beta(0.95)
    eps: float = at_least(0, 1e-8)
    root: int = at_least(1, 4)
    damping: float = at_least(0, 1e-6)
    graft: Literal["none", "adam"] = one_of(Literal["none", "adam"], "none")
    nesterov: bool = flag(False)
    correct_bias: bool = flag(True)
    correct_shampoo_beta_bias: bool | None = flag(None)
    max_update_rms: float = at_least(0, 0.0, "0: no limit")

    def init(self, G: Tensor) -> State:
        state = {"exp_avg": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)}  # [B, m, n]
        factors = Factors.init(G, self.max_precond_dim, self.precondition_1d)
        return state | {name.replace("Q_", "P_"): x for name, x in factors.items()}  # roots start at the identity too

    def factors(self, state: State, step: Step) -> Factors:
        return Factors(state, step.failures)

    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        G = G if step.penalty is None else G + step.penalty
        corrects = self.correct_bias if self.correct_shampoo_beta_bias is None else self.correct_shampoo_beta_bias
        factors.accumulate(G, corrected_beta(self.shampoo_beta, step.t) if corrects else self.shampoo_beta)

    def update_bases(self, factors: Factors, slots: Slots, step: Step) -> None:
        state = factors.state
        for side, _ in SIDES:
            if side in state:
                new = matrix_power(state[side][slots], -1 / self.root, eps=self.damping)
                state[f"P_{side}"][slots] = step.found(new, state[f"P_{side}"][slots], slots)

    def direction(self, G: Tensor, factors: Factors, step: Step) -> Tensor:
        state = factors.state
        g = G if step.penalty is None else G + step.penalty
        u = adam(g, state, step.t, self.betas, self.eps, correct_bias=self.correct_bias, nesterov=self.nesterov)
        D = into(u, state.get("P_L"), state.get("P_R"))  # symmetric, so the transpose in it is none
        D = with_norm(D, frobenius(u)) if self.graft == "adam" else D
        return clip_rms(D, self.max_update_rms)
