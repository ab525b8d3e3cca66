"""Adam's direction between two inverse roots: a formula that circulates under SOAP's name, and is not SOAP.

    W ← W - lr · L^(-1/root) Adam(G) R^(-1/root)        L = E[G Gᵀ], R = E[Gᵀ G]

Adam already divides by the gradient's size, and the roots do it again: gradients 100 times as large give updates 100
times as small (root = 4). ``graft="adam"`` gives each matrix the norm of Adam's own direction back, which leaves the
roots only the say in its direction. Memory is O(m² + n²) beside Adam's. `steepest.SOAP(form="inverse_root")` runs it;
checked in tests/reference/test_inverse_root.py.

  G                    [B, m, n]             gradients
  L, R                 [B, m, m], [B, n, n]  covariances of rows and columns
  P_L, P_R             likewise              their inverse roots, of the last refresh
  exp_avg, exp_avg_sq  [B, m, n]             Adam's moments of G
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.flops import Work, eigh, product, total
from steepest.linalg.phases import phase
from steepest.linalg.roots import matrix_power
from steepest.rule import Refreshing, Slots, State, Step, at_least, beta, betas, one_of
from steepest.rules.parts.factors import Factors
from steepest.rules.parts.kronecker import precondition
from steepest.rules.parts.moments import adam, corrected_beta
from steepest.rules.parts.scales import clip_rms, frobenius, with_norm


@dataclass(frozen=True, kw_only=True)
class InverseRoot(Refreshing):
    """Options as `steepest.SOAP` describes them under ``form``."""

    name: ClassVar[str] = "inverse_root"
    paper: ClassVar[str] = "none: a formula that goes by SOAP's name"

    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = beta(0.95)
    eps: float = at_least(0, 1e-8)
    root: int = at_least(1, 4)
    damping: float = at_least(0, 1e-6)
    graft: str = one_of(("none", "adam"), "none")
    nesterov: bool = False
    correct_bias: bool = True
    correct_shampoo_beta_bias: bool | None = None
    max_update_rms: float = at_least(0, 0.0, "0: no limit")
    precondition_1d: bool = False
    fp32_matmul_prec: str = "highest"

    def init(self, G: Tensor) -> State:
        state = Factors.init(G, self.max_precond_dim, self.precondition_1d, bases=False)
        roots = {f"P_{side}": torch.zeros_like(K) for side, K in state.items()}
        for P in roots.values():
            P.diagonal(dim1=-2, dim2=-1).fill_(1)
        return {"exp_avg": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)} | state | roots

    def update(self, G: Tensor, state: State, step: Step) -> Tensor:
        corrects = self.correct_bias if self.correct_shampoo_beta_bias is None else self.correct_shampoo_beta_bias
        Factors(state).feed(G, corrected_beta(self.shampoo_beta, step.t) if corrects else self.shampoo_beta)
        if step.refresh is not None:
            self.follow(state, step, step.refresh)
        g = G if step.penalty is None else G + step.penalty
        u = adam(g, state, step.t, self.betas, self.eps, correct_bias=self.correct_bias, nesterov=self.nesterov)
        D = precondition(u, [state.get("P_L"), state.get("P_R")])  # symmetric, so the transpose in it is none
        if self.graft == "adam":
            D = with_norm(D, frobenius(u))
        return clip_rms(D, self.max_update_rms)

    def work(self, m: int, n: int) -> Work:
        """4mn(m+n): feed and precondition. At a refresh on each side a full decomposition and a product, 9d³ + 2d³."""
        sides = self.sides(m, n)
        roots = total(eigh(d) + product(d, d, d) for d in sides)
        return 2 * total(product(d, m, n) for d in sides) + roots.every(self.last_period)

    @phase("refresh")
    def follow(self, state: State, step: Step, slots: Slots) -> None:
        """The inverse roots of these slots follow their covariances."""
        for side in state.keys() & {"L", "R"}:
            K, P = state[side][slots], state[f"P_{side}"][slots]
            state[f"P_{side}"][slots] = step.found(matrix_power(K, -1 / self.root, eps=self.damping), P, slots)
