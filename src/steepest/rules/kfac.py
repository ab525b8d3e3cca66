"""K-FAC: the momentum of a layer's gradient between inverses of two Kronecker factors of its Fisher matrix.

    A ← β A + (1-β) E[ā āᵀ],  B ← β B + (1-β) E[δ δᵀ]           where statistics have come in
    A_d = A + √d · tr A / n I,  B_d = B + √d · tr B / m I        B ⊗ A stands for E[vec G (vec G)ᵀ]
    M ← μ M + (1-μ) G
    D = B_d⁻¹ M A_d⁻¹

Martens and Grosse, arXiv:1503.05671, with damping relative to the factors' mean eigenvalues; damping_form="absolute" is
the paper's. The engine scales all D by one number, min(1, √(κ / Σ ⟨D, M⟩)). Checked in tests/reference/test_kfac.py.

  G         [B, m, n]             gradients of [W, b]: the bias is the last column
  ā, δ      n, m entries          a layer's inputs and 1; gradients of one loss term with respect to its outputs
  A, B      [B, n, n], [B, m, m]  their second moments                       state: A, B, statistics (how many came in)
  P_A, P_B  [B, n, n], [B, m, m]  A_d⁻¹ and B_d⁻¹, of the last refresh
  Q_A, Q_B  [B, n, n], [B, m, m]  with form="eigen": eigenvectors of A and B, of the last refresh
  S         [B, m, n]             and the products of their eigenvalues: D = Q_B [(Q_Bᵀ M Q_A) / (S + d mean S)] Q_Aᵀ
  M         [B, m, n]             momentum, bias-corrected                   state: exp_avg
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.roots import inverse
from steepest.rule import Refreshing, Slots, State, Step, at_least, beta, flag, frequency, lays_out, one_of
from steepest.rule.words import ClipWith, CurvatureForm, DampingForm, Solver, SpectrumDamping
from steepest.rules.parts.factors import into
from steepest.rules.parts.fisher import SIDES, divided, put, take_in, update_eigenbases
from steepest.rules.parts.moments import correction


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
    damping_form: SpectrumDamping = one_of(DampingForm, "relative")
    kl_clip: float = at_least(0, 1e-2, "0: none")
    clip_with: ClipWith = one_of(ClipWith, "momentum")
    solver: Solver = one_of(Solver, "auto")
    bias: bool = lays_out(flag(False))  # whether the layer's bias is in the matrix: a view's option, set by routing

    @property
    @abstractmethod
    def in_basis(self) -> bool:
        """Whether directions are divided in eigenbases, and not multiplied by inverses."""

    def init(self, G: Tensor) -> State:
        state, kind = {"exp_avg": torch.zeros_like(G), "statistics": G.new_zeros(len(G))}, "Q" if self.in_basis else "P"
        for side, dim in SIDES:
            if (d := G.shape[dim]) <= self.max_precond_dim:
                state[side] = G.new_zeros(len(G), d, d)
                state[f"{kind}_{side}"] = torch.eye(d, dtype=G.dtype, device=G.device).repeat(len(G), 1, 1)
        return state | ({"S": torch.zeros_like(G)} if self.in_basis else {})

    def factors(self, state: State, step: Step) -> State:
        return state

    def update_factors(self, G: Tensor, state: State, step: Step) -> None:
        take_in(state, step.statistics, self.factor_beta, step.failures)

    def update_bases(self, state: State, slots: Slots, step: Step) -> None:
        if self.in_basis:
            return update_eigenbases(state, slots, step, self.solver)
        K = {side: state[side][slots] for side, _ in SIDES if side in state}
        λ = {side: x.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1) for side, x in K.items()}  # [b, 1, 1]
        for side, x in K.items():
            other = λ.get({"A": "B", "B": "A"}[side], torch.ones_like(λ[side]))
            shift = self.damping**0.5 * (λ[side] if self.damping_form == "relative" else (λ[side] / other).sqrt())
            known = (λ[side] > 0) & (other > 0)  # of zeros nothing is known
            P = inverse(x, torch.where(known, shift, 1.0))
            put(state[f"P_{side}"], slots, P, known.view(-1) & step.solved(P, slots))

    def direction(self, G: Tensor, state: State, step: Step) -> Tensor:
        G = G if step.penalty is None else G + step.penalty
        fed = (state["statistics"] > 0).view(-1, 1, 1)
        M = state["exp_avg"].lerp_(G, 1 - self.momentum) * (fed / correction(self.momentum, step.t))  # [B, m, n]
        if self.in_basis:
            return divided(M, state, self.damping, self.damping_form)
        return into(M, state.get("P_B"), state.get("P_A"))  # both are symmetric

    def clip_gradient(self, G: Tensor, state: State, t: Tensor) -> Tensor:
        return state["exp_avg"] / correction(self.momentum, t) if self.clip_with == "momentum" else G


@dataclass(frozen=True, kw_only=True)
class Kfac(LayerFisher):
    """Options as `steepest.KFAC` describes them."""

    name: ClassVar[str] = "kfac"
    paper: ClassVar[str] = "Martens and Grosse, arXiv:1503.05671"

    form: CurvatureForm = lays_out(one_of(CurvatureForm, "inverse"))

    @property
    def in_basis(self) -> bool:
        return self.form == "eigen"
