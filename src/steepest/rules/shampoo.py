"""Shampoo: the momentum between inverse roots of the gradients' two covariances.

    L ← β L + (1-β) G Gᵀ,  R ← β R + (1-β) Gᵀ G          β = 1: sums, as in the first paper
    D = L^p M R^p                                        p = -1/4; with one factor only -1/2

Gupta et al., arXiv:1802.09568, Algorithm 1; averages and grafting as in Shi et al., arXiv:2309.06497; with
``use_kl_shampoo`` and p = -1/2 it is KL-Shampoo, Lin et al., arXiv:2509.03378. Checked against its authors' numbers in
tests/reference/test_shampoo.py. Roots are taken in the eigenbases of the last refresh, but of the eigenvalues that the
factors have in them now: a direction that gradients enter between two refreshes is damped at once.

  G         [B, m, n]             gradients
  M         [B, m, n]             their momentum, bias-corrected     state: exp_avg
  L, R      [B, m, m], [B, n, n]  covariances of rows and columns (at β = 1 divided by t)
  Q_L, Q_R  likewise              their eigenvectors, of the last refresh
  λ         [B, m], [B, n]        diag(Qᵀ K Q), their eigenvalues   state: lambda_L, lambda_R
  v         [B, m, n]             second moment, for grafting        state: exp_avg_sq
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.eigenbasis import conjugate, eigenvectors, orthogonal_iteration
from steepest.linalg.flops import Work, eigh, iteration, product, total
from steepest.linalg.phases import phase
from steepest.linalg.precision import PRECISIONS, fp32_matmul_precision
from steepest.linalg.roots import spectral_power
from steepest.rule import Refreshing, Slots, State, Step, at_least, betas, checked, one_of
from steepest.rules.parts.factors import Factors
from steepest.rules.parts.moments import corrected_beta, correction
from steepest.rules.parts.scales import frobenius, with_norm


@dataclass(frozen=True, kw_only=True)
class Shampoo(Refreshing):
    """Options as `steepest.Shampoo` describes them."""

    name: ClassVar[str] = "shampoo"
    paper: ClassVar[str] = "Gupta et al., arXiv:1802.09568"

    betas: tuple[float, float] = betas((0.9, 0.95))
    shampoo_beta: float = checked(0.95, lambda x: 0 <= x <= 1, "a number in [0, 1]; 1 means sums")
    exponent: float | None = checked(None, lambda p: p is None or p < 0, "a number < 0, or None for -1/(2 · factors)")
    eps: float = at_least(0, 1e-6)
    relative_eps: bool = True
    graft: str = one_of(("none", "sgd", "adam", "rmsprop"), "adam")
    graft_eps: float = at_least(0, 1e-8)
    use_kl_shampoo: bool = False
    kl_floor: float = checked(1e-4, lambda x: 0 <= x < 1, "in [0, 1); 0 means the absolute eps")
    solver: str = one_of(("qr", "eigh"), "qr")
    power_iter_steps: int = at_least(1, 1)
    fp32_matmul_prec: str = one_of(PRECISIONS, "highest")
    precondition_1d: bool = False

    def init(self, G: Tensor) -> State:
        state = {"exp_avg": torch.zeros_like(G)}  # [B, m, n]
        if self.graft in ("adam", "rmsprop"):
            state["exp_avg_sq"] = torch.zeros_like(G)
        state |= Factors.init(G, self.max_precond_dim, self.precondition_1d)
        return state | {f"lambda_{side}": torch.zeros_like(state[side][..., 0]) for side in state.keys() & {"L", "R"}}

    def update(self, G: Tensor, state: State, step: Step) -> Tensor:
        with fp32_matmul_precision(self.fp32_matmul_prec):
            factors, t = Factors(state), step.t
            beta = corrected_beta(self.shampoo_beta, t) if self.shampoo_beta < 1 else 1 - 1 / t
            if self.use_kl_shampoo:
                factors.feed_kl(G, beta, self.eps, self.kl_floor)
            else:
                factors.feed(G, beta)
            self.track(G, state, beta)
            if step.refresh is not None:
                self.follow(state, step, step.refresh)
            G = G if step.penalty is None else G + step.penalty
            M = state["exp_avg"].lerp_(G, 1 - self.betas[0]) / correction(self.betas[0], t)
            D = factors.unproject(self.whiten(factors.project(M), state, t))
        return self.grafted(D, M, G, state, t)

    def track(self, G: Tensor, state: State, beta: Tensor) -> None:
        """Bring λ = diag(Qᵀ K Q) up to date: it is linear in K, so it takes a gradient in as K does."""
        if self.use_kl_shampoo:  # K took it in whitened, and λ with it
            return
        g2 = Factors(state).project(G).square()  # [B, m, n]
        for side, energy in (("L", g2.sum(dim=-1)), ("R", g2.sum(dim=-2))):  # [B, m], [B, n]
            if side in state:
                state[f"lambda_{side}"].lerp_(energy, (1 - beta).squeeze(-1))

    @phase("refresh")
    def follow(self, state: State, step: Step, slots: Slots) -> None:
        """The bases of these slots follow their factors."""
        first = step.stage == "first"
        for side in state.keys() & {"L", "R"}:
            K, Q = state[side][slots], state[f"Q_{side}"][slots]
            if first or self.solver == "eigh":
                new = eigenvectors(K, force_double=first)
            else:
                new = orthogonal_iteration(K, Q, self.power_iter_steps)
            Q = step.found(new, Q, slots)
            state[f"Q_{side}"][slots] = Q
            state[f"lambda_{side}"][slots] = conjugate(K, Q, diag=True)

    def work(self, m: int, n: int) -> Work:
        """8mn(m+n): feed, project gradient and momentum, unproject. With KL on two sides 2mn·min(m, n) more.

        At a refresh on each side two products and a QR decomposition, 4d³ + 8d³/3, or a product and a full
        decomposition, 2d³ + 9d³.
        """
        sides = self.sides(m, n)
        along = total(product(d, m, n) for d in sides)  # 2mn(m+n)
        cubes = total(product(d, d, d) for d in sides)
        every = 4 * along
        if self.use_kl_shampoo and len(sides) == 2:
            every += product(m, min(m, n), n)
        solve = total(eigh(d) if self.solver == "eigh" else iteration(d, self.power_iter_steps) for d in sides)
        return (every + (solve + cubes).every(self.last_period)).at(self.fp32_matmul_prec)

    def whiten(self, projected: Tensor, state: State, t: Tensor) -> Tensor:
        """``Λ_L^p · Λ_R^p`` for the momentum in the eigenbases, ``[B, m, n]``."""
        sides = [side for side in ("L", "R") if side in state]
        for side in sides:
            eigenvalues = state[f"lambda_{side}"]  # [B, d]
            if self.shampoo_beta == 1:
                eigenvalues = eigenvalues * t.squeeze(-1)
            power = spectral_power(
                eigenvalues, self.exponent or -0.5 / len(sides), eps=self.eps, relative=self.relative_eps
            )
            projected = projected * power.unsqueeze(-1 if side == "L" else -2)
        return projected

    def grafted(self, D: Tensor, M: Tensor, G: Tensor, state: State, t: Tensor) -> Tensor:
        """``D [B, m, n]`` with the norm of the step that another method would take."""
        if self.graft == "none":
            return D
        other = M
        if self.graft != "sgd":
            v = state["exp_avg_sq"].mul_(self.betas[1]).addcmul_(G, G, value=1 - self.betas[1])
            v = v / correction(self.betas[1], t) if self.graft == "adam" else v
            other = M / (v.sqrt() + self.graft_eps)
        return with_norm(D, frobenius(other))


@dataclass(frozen=True, kw_only=True)
class KlShampoo(Shampoo):
    """Stub."""

    name: ClassVar[str] = "kl_shampoo"
    paper: ClassVar[str] = "Lin et al., arXiv:2509.03378"

    use_kl_shampoo: bool = True
