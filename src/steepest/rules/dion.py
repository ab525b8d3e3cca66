"""Dion: the momentum's leading subspace, orthonormalized; what is left out stays in the momentum.

One step of power iteration per update follows the subspace. Ahn et al., arXiv:2504.05295, Algorithm 1. Checked against
its authors' numbers in tests/reference/test_dion.py. For m >= n (wide matrices likewise, transposed):

    M ← M + G
    P = orthonormal(M Q)
    R = Mᵀ P
    M ← M - (1-μ) P Rᵀ                  error feedback: only what was applied decays
    Q ← R, columns normalized
    D = scale · P Qᵀ                    as its factors, which is how it travels between ranks

  G  [B, m, n]  gradients
  M  [B, m, n]  momentum and everything not yet applied     state: momentum_buffer
  Q  [B, n, r]  right basis of the subspace                 state: Q
  P  [B, m, r]  left basis
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.linalg.orthonormal import ORTHONORMALIZERS, gaussian
from steepest.rule import LowRank, Rule, State, Step, beta, checked, lays_out, number, one_of
from steepest.rule.words import MomentDtype, Orthonormalizer, Scale
from steepest.rules.parts.scales import SCALES


@dataclass(frozen=True, kw_only=True)
class Dion(Rule):
    """Options as `steepest.Dion` describes them."""

    name: ClassVar[str] = "dion"
    paper: ClassVar[str] = "Ahn et al., arXiv:2504.05295"

    momentum: float = beta(0.95)
    rank_fraction: float = lays_out(checked(0.25, lambda x: number(x) and 0 < x <= 1, "a number in (0, 1]"))
    scale: Scale = one_of(Scale, "match_rms_adamw")
    orthonormalize: Orthonormalizer = one_of(Orthonormalizer, "rcqr")
    moment_dtype: MomentDtype = lays_out(one_of(MomentDtype, "float32"))

    def init(self, G: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(G), "Q": self.first_basis(G).repeat(len(G), 1, 1)}

    def first_basis(self, G: Tensor) -> Tensor:
        """What Q starts at, for each matrix, ``[n, r]``."""
        return gaussian(min(G.shape[1:]), self.rank(*G.shape[1:]), G)

    def stage(self, clock: int) -> str:
        return "first" if clock == 0 else "steady"

    def rank(self, m: int, n: int) -> int:
        return math.ceil(self.rank_fraction * min(m, n))

    def update(self, G: Tensor, state: State, step: Step) -> LowRank:
        M = state["momentum_buffer"].add_(G if step.penalty is None else G + step.penalty)
        if step.stage == "first":  # where somebody has zeroed all of the state, Q starts anew
            dead = state["Q"].abs().amax(dim=(-2, -1), keepdim=True) == 0  # [B, 1, 1]
            state["Q"].copy_(torch.where(dead, self.first_basis(G), state["Q"]))
        wide = G.shape[1] < G.shape[2]
        P, Q = self.follow(M.mT if wide else M, state["Q"], step)
        Q = Q * SCALES[self.scale](*G.shape[1:])
        return LowRank(Q, P) if wide else LowRank(P, Q)

    def follow(self, M: Tensor, Q: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One power iteration for ``M [B, m, n]``, in place in both; P and Q of the direction."""
        P = step.found(ORTHONORMALIZERS[self.orthonormalize](M @ Q), 0.0)  # [B, m, r]; by zero, nothing is applied
        R = M.mT @ P  # [B, n, r]
        M.baddbmm_(P, R.mT, alpha=self.momentum - 1)
        norms = torch.linalg.vector_norm(R, dim=-2, keepdim=True)  # [B, 1, r]
        # Beyond the rank of M a column of R is rounding. It takes no part in the step, and Q keeps its direction there.
        seen = norms > max(M.shape[1:]) * torch.finfo(R.dtype).eps * norms.amax(dim=-1, keepdim=True)
        new = torch.where(seen, R / norms, 0)
        Q.copy_(torch.where(seen, new, Q))
        return P, new
