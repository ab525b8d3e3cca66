"""Shampoo: the momentum between inverse roots of the gradients' two covariances.

    L ← β L + (1-β) G Gᵀ,  R ← β R + (1-β) Gᵀ G          β = 1: sums, as in the first paper
    D = L^p M R^p                                        p = -1/4; with one factor only -1/2

Gupta et al., arXiv:1802.09568, Algorithm 1; averages and grafting as in Shi et al., arXiv:2309.06497. Checked against
its authors' numbers in tests/reference/test_shampoo.py. Roots are taken in the eigenbases of the last refresh, but of
the eigenvalues that the factors have in them now: a direction that gradients enter between two refreshes is damped at
once.

  G         [B, m, n]             gradients
  M         [B, m, n]             their momentum, bias-corrected     state: exp_avg
  L, R      [B, m, m], [B, n, n]  covariances of rows and columns (at β = 1 divided by t)
  Q_L, Q_R  [B, m, m], [B, n, n]  their eigenvectors, of the last refresh
  λ         [B, m], [B, n]        diag(Qᵀ K Q), their eigenvalues    state: lambda_L, lambda_R
  v         [B, m, n]             second moment, for grafting        state: exp_avg_sq
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steepest.linalg.eigenbasis import conjugate, eigenvectors
from steepest.linalg.roots import spectral_power
from steepest.linalg.solvers import orthogonal_iteration
from steepest.rule import Refreshing, Slots, State, Step, at_least, betas, checked, flag, lays_out, number, one_of
from steepest.rule.words import Graft
from steepest.rules.parts.factors import SIDES, Factors
from steepest.rules.parts.moments import corrected_beta, correction
from steepest.rules.parts.scales import frobenius, with_norm


@dataclass(frozen=True, kw_only=True)
class RootsInBasis(Refreshing[Factors], ABC):
    """The momentum between powers of two covariances; a subclass says of which covariances."""

    precondition_1d: bool = lays_out(flag(False))
    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = checked(0.95, lambda x: number(x) and 0 <= x <= 1, "a number in [0, 1]; 1 means sums")
    exponent: float | None = checked(
        None, lambda p: p is None or (number(p) and p < 0), "a number < 0, or None for -1/(2 · factors)"
    )
    eps: float = at_least(0, 1e-6)
    relative_eps: bool = flag(True)
    graft: Graft = lays_out(one_of(Graft, "adam"))
    graft_eps: float = at_least(0, 1e-8)
    solver: Literal["qr", "eigh"] = one_of(Literal["qr", "eigh"], "qr")
    power_iter_steps: int = at_least(1, 1)

    def init(self, G: Tensor) -> State:
        state = {"exp_avg": torch.zeros_like(G)}  # [B, m, n]
        if self.graft in ("adam", "rmsprop"):
            state["exp_avg_sq"] = torch.zeros_like(G)
        factors = Factors.init(G, self.max_precond_dim, self.precondition_1d)
        return state | factors | {f"lambda_{s}": torch.zeros_like(factors[s][..., 0]) for s, _ in SIDES if s in factors}

    def factors(self, state: State, step: Step) -> Factors:
        return Factors(state, step.failures)

    def factor_beta(self, t: Tensor) -> Tensor:
        """β of the covariances, ``[B, 1, 1]``, which makes them unbiased averages at every step."""
        return corrected_beta(self.shampoo_beta, t) if self.shampoo_beta < 1 else 1 - 1 / t

    def update_bases(self, factors: Factors, slots: Slots, step: Step) -> None:
        state, first = factors.state, factors.first_bases(slots) if step.stage == "first" else {}
        for side, _ in SIDES:
            if side in state:
                K, Q = state[side][slots], state[f"Q_{side}"][slots]
                if side in first:
                    new = first[side]
                elif self.solver == "eigh":
                    new = eigenvectors(K)
                else:
                    new = orthogonal_iteration(K, Q, self.power_iter_steps)
                state[f"Q_{side}"][slots] = Q = step.found(new, Q, slots)
                state[f"lambda_{side}"][slots] = conjugate(K, Q, diag=True)

    def direction(self, G: Tensor, factors: Factors, step: Step) -> Tensor:
        state, t = factors.state, step.t
        G = G if step.penalty is None else G + step.penalty
        M = state["exp_avg"].lerp_(G, 1 - self.betas[0]) / correction(self.betas[0], t)
        D = factors.unproject(self.whiten(factors.project(M), state, t))
        return self.grafted(D, M, G, state, t)

    def whiten(self, projected: Tensor, state: State, t: Tensor) -> Tensor:
        """``Λ_L^p · Λ_R^p`` for the momentum in the eigenbases, ``[B, m, n]``."""
        sides = [(side, dim) for side, dim in SIDES if side in state]
        for side, dim in sides:
            λ = state[f"lambda_{side}"] * t.squeeze(-1) if self.shampoo_beta == 1 else state[f"lambda_{side}"]  # [B, d]
            p = self.exponent or -0.5 / len(sides)
            projected = projected * spectral_power(λ, p, eps=self.eps, relative=self.relative_eps).unsqueeze(-3 - dim)
        return projected

    def grafted(self, D: Tensor, M: Tensor, G: Tensor, state: State, t: Tensor) -> Tensor:
        """``D [B, m, n]`` with the norm of the step that another method would take."""
        if self.graft == "none":
            return D
        if self.graft == "sgd":
            return with_norm(D, frobenius(M))
        v = state["exp_avg_sq"].mul_(self.betas[1]).addcmul_(G, G, value=1 - self.betas[1])
        v = v / correction(self.betas[1], t) if self.graft == "adam" else v
        return with_norm(D, frobenius(M / (v.sqrt() + self.graft_eps)))


@dataclass(frozen=True, kw_only=True)
class Shampoo(RootsInBasis):
    """Options as `steepest.Shampoo` describes them."""

    name: ClassVar[str] = "shampoo"
    paper: ClassVar[str] = "Gupta et al., arXiv:1802.09568"

    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        beta, state = self.factor_beta(step.t), factors.state
        G = G if step.penalty is None else G + step.penalty
        factors.accumulate(G, beta)
        g2 = factors.project(G).square()  # [B, m, n]; λ is linear in K, so it takes a gradient in as K does
        for side, energy in (("L", g2.sum(dim=-1)), ("R", g2.sum(dim=-2))):  # [B, m], [B, n]
            if side in state:
                state[f"lambda_{side}"].lerp_(energy, (1 - beta).squeeze(-1))
