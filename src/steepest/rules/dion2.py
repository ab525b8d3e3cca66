"""Dion2: Muon on the rows that have waited longest.

The momentum only adds up; each step orthogonalizes the fraction α of its rows (columns, if it is tall) with the largest
L1 norm and lets those decay, so that what is not applied is not forgotten. Ahn et al., arXiv:2512.16928, Algorithm 1.
Checked against its authors' numbers in tests/reference/test_dion2.py. For m <= n (the other way round likewise):

    M ← M + G
    K = the α m rows of M with the largest L1 norm
    D[K] = scale · polar(M[K]), and zero elsewhere
    M[K] ← ef_decay · M[K]

  G  [B, m, n]   gradients
  M  [B, m, n]   accumulated gradients      state: momentum_buffer
  K  [B, k, 1]   indices of rows, k = α m
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.rule import State, Step, beta, checked, lays_out, number, one_of
from steepest.rule.words import MomentDtype, Scale
from steepest.rules.parts.newton_schulz import NewtonSchulz
from steepest.rules.parts.scales import SCALES


@dataclass(frozen=True, kw_only=True)
class Dion2(NewtonSchulz):
    """Options as `steepest.Dion2` describes them."""

    name: ClassVar[str] = "dion2"
    paper: ClassVar[str] = "Ahn et al., arXiv:2512.16928"

    fraction: float = checked(0.25, lambda x: number(x) and 0 < x <= 1, "a number in (0, 1]")
    ef_decay: float = beta(0.95)
    scale: Scale = one_of(Scale, "match_rms_adamw")
    moment_dtype: MomentDtype = lays_out(one_of(MomentDtype, "float32"))

    def init(self, G: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(G)}  # [B, m, n]

    def update(self, G: Tensor, state: State, step: Step) -> Tensor:
        M = state["momentum_buffer"].add_(G if step.penalty is None else G + step.penalty)
        D = torch.zeros_like(G)
        scale = SCALES[self.scale](*G.shape[1:])
        if G.shape[1] > G.shape[2]:
            self.apply_largest(M.mT, D.mT, scale, step)
        else:
            self.apply_largest(M, D, scale, step)
        return D

    def apply_largest(self, M: Tensor, D: Tensor, scale: float, step: Step) -> None:
        """Move the largest rows of ``M [B, s, l]`` into ``D``, orthogonalized; both are changed in place."""
        k = math.ceil(self.fraction * M.shape[1])
        K = M.abs().sum(dim=-1, keepdim=True).topk(k, dim=1).indices  # [B, k, 1]
        K = K.expand(-1, -1, M.shape[2])
        rows = M.gather(1, K)  # [B, k, l]
        D.scatter_(1, K, self.polar(rows, step) * scale)
        M.scatter_(1, K, rows * self.ef_decay)
