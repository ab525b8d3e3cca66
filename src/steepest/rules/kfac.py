"""K-FAC: the momentum of a layer's gradient between inverses of two Kronecker factors of its Fisher matrix.

    A ← β A + (1-β) E[ā āᵀ],  B ← β B + (1-β) E[δ δᵀ]          where statistics have come in
    A_d = A + √d · tr A / n I,  B_d = B + √d · tr B / m I       relative damping d; E[vec G vec Gᵀ] ≈ B ⊗ A
    M ← μ M + (1-μ) G
    D = B_d⁻¹ M A_d⁻¹

Martens and Grosse, arXiv:1503.05671; momentum before the inverses as in Adam. The engine scales all directions by one
number (`Rule.kl_clip`). Checked in tests/reference/test_kfac.py.

  G         [B, m, n]             gradients of [W, b]: the bias is the last column
  ā, δ      n, m entries          a layer's inputs and 1; gradients of one loss term with respect to its outputs
  A, B      [B, n, n], [B, m, m]  their second moments; τ [B], how many came in     state: A, B, statistics
  P_A, P_B  likewise              the inverses of the damped factors, of the last refresh
  Q_A, Q_B  likewise              form="eigen": the factors' eigenvectors, of the last refresh
  S         [B, m, n]             and the products of their eigenvalues, of the Fisher matrix in these bases
  M         [B, m, n]             momentum, bias-corrected                          state: exp_avg
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.attempts import succeeded
from steepest.linalg.eigenbasis import conjugate, eigenvectors
from steepest.linalg.roots import inverse
from steepest.linalg.solvers import SOLVERS, choose
from steepest.rule import Refreshing, Slots, State, Step, at_least, beta, flag, frequency, lays_out, one_of
from steepest.rule.words import CurvatureForm, DampingForm, Solver
from steepest.rules.parts.factors import into
from steepest.rules.parts.moments import corrected_beta, correction

SIDES = (("B", -2), ("A", -1))
"""Each factor's name in the state, and the dimension of ``G`` that it belongs to."""


@dataclass(frozen=True, kw_only=True)
class LayerFisher(Refreshing[State], ABC):
    """The momentum, multiplied by the inverse of a layer's Fisher matrix; a subclass says in which form."""

    captures: ClassVar[bool] = True

    precondition_frequency: int | Callable[[int], int] = frequency(20)
    statistics_frequency: int = at_least(1, 5)
    settle: int = at_least(0, 50)
    momentum: float = beta(0.9)
    factor_beta: float = beta(0.95)
    damping: float = at_least(0, 1e-2)
    damping_form: DampingForm = one_of(DampingForm, "relative")
    kl_clip: float = at_least(0, 1e-2, "0: none")
    solver: Solver = one_of(Solver, "auto")
    bias: bool = lays_out(flag(False))  # whether a weight's matrix has its layer's bias; the optimizer sets it

    @property
    @abstractmethod
    def in_basis(self) -> bool:
        """Whether directions are divided by eigenvalues in an eigenbasis, or multiplied by inverses."""

    def init(self, G: Tensor) -> State:
        state, kind = {"exp_avg": torch.zeros_like(G), "statistics": G.new_zeros(len(G))}, "Q" if self.in_basis else "P"
        for side, dim in SIDES:
            d = G.shape[dim]
            state[side] = G.new_zeros(len(G), d, d)
            state[f"{kind}_{side}"] = torch.eye(d, dtype=G.dtype, device=G.device).repeat(len(G), 1, 1)
        return state | ({"S": torch.zeros_like(G)} if self.in_basis else {})

    def factors(self, state: State, step: Step) -> State:
        return state

    def update_factors(self, G: Tensor, state: State, step: Step) -> None:
        if (new := step.statistics) is None:
            return
        found = {name: x for name, x in (("A", new.A), ("B", new.B), ("S", new.S)) if x is not None}
        good = torch.stack([succeeded(x) for x in found.values()]).all(dim=0)  # [b]
        state["statistics"][new.slots] += good
        if step.failures is not None:
            step.failures[new.slots] += ~good
        good = good.view(-1, 1, 1)
        weight = 1 - corrected_beta(self.factor_beta, state["statistics"][new.slots].view(-1, 1, 1))
        for name, x in found.items():
            old = state[name][new.slots]
            state[name][new.slots] = torch.where(good, old.lerp(x, weight), old)

    def update_bases(self, state: State, slots: Slots, step: Step) -> None:
        K = {side: state[side][slots] for side, _ in SIDES}
        λ = {side: x.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1) for side, x in K.items()}  # [b, 1, 1]
        for side, other in ("BA", "AB"):
            if self.in_basis:
                Q = state[f"Q_{side}"][slots]
                new = eigenvectors(K[side]) if step.stage == "first" else self.followed(K[side], Q)
                state[f"Q_{side}"][slots] = Q = step.found(new, Q, slots)
                λ[side] = conjugate(K[side], Q, diag=True).clamp(min=0)  # [b, d]
            else:
                size = λ[side] if self.damping_form == "relative" else (λ[side] / λ[other]).sqrt()
                P, fed = state[f"P_{side}"][slots], (λ[side] > 0) & (λ[other] > 0)
                new = inverse(K[side], torch.where(fed, self.damping**0.5 * size, 1.0))
                state[f"P_{side}"][slots] = torch.where(fed, step.found(new, P, slots), P)
        if self.in_basis:
            state["S"][slots] = λ["B"].unsqueeze(-1) * λ["A"].unsqueeze(-2)

    def followed(self, K: Tensor, Q: Tensor) -> Tensor:
        """Eigenvectors of ``K [b, d, d]`` that follow those of the last refresh."""
        return SOLVERS[choose(K.device.type) if self.solver == "auto" else self.solver](K, Q, 1)[0]

    def direction(self, G: Tensor, state: State, step: Step) -> Tensor:
        G = G if step.penalty is None else G + step.penalty
        M = state["exp_avg"].lerp_(G, 1 - self.momentum) / correction(self.momentum, step.t)  # [B, m, n]
        if not self.in_basis:
            return into(M, state["P_B"], state["P_A"])  # both are symmetric
        Q_B, Q_A, S = state["Q_B"], state["Q_A"], state["S"]
        floor = S.mean(dim=(-2, -1), keepdim=True) if self.damping_form == "relative" else 1.0
        u = into(M, Q_B, Q_A) / (S + self.damping * floor + torch.finfo(S.dtype).tiny)
        return into(u, Q_B.mT, Q_A.mT)


@dataclass(frozen=True, kw_only=True)
class Kfac(LayerFisher):
    """Options as `steepest.KFAC` describes them."""

    name: ClassVar[str] = "kfac"
    paper: ClassVar[str] = "Martens and Grosse, arXiv:1503.05671"

    form: CurvatureForm = lays_out(one_of(CurvatureForm, "inverse"))

    @property
    def in_basis(self) -> bool:
        return self.form == "eigen"
