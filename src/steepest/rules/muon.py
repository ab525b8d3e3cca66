"""Muon: momentum, orthogonalized.

    M ← μ M + (1-μ) G
    D = scale · polar(μ M + (1-μ) G)            without Nesterov: scale · polar(M)

K. Jordan et al., https://kellerjordan.github.io/posts/muon (2024). Checked against its author's numbers in
tests/reference/test_muon.py. NorMuon and AdaMuon do more with the polar factor, and share all the rest.

  G, D  [B, m, n]  gradients and directions      polar(U Σ Vᵀ) = U Vᵀ
  M     [B, m, n]  momentum                      state: momentum_buffer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.rule import State, Step, beta, flag, lays_out, one_of
from steepest.rule.words import MomentDtype, Scale
from steepest.rules.parts.newton_schulz import NewtonSchulz
from steepest.rules.parts.scales import SCALES


@dataclass(frozen=True, kw_only=True)
class Orthogonalized(NewtonSchulz, ABC):
    """Momentum in, a matrix with singular values near one out; what is in between, the subclass says."""

    averages: ClassVar[tuple[str, ...]] = ("momentum_buffer", "failures")
    momentum: float = beta(0.95)
    nesterov: bool = flag(True)
    scale: Scale = one_of(Scale, "match_rms_adamw")
    moment_dtype: MomentDtype = lays_out(one_of(MomentDtype, "float32"))

    def init(self, G: Tensor) -> State:
        return {"momentum_buffer": torch.zeros_like(G)}  # [B, m, n]

    def update(self, G: Tensor, state: State, step: Step) -> Tensor:
        G = G if step.penalty is None else G + step.penalty
        M = state["momentum_buffer"].lerp_(G, step.rate(1 - self.momentum))
        M = G.lerp(M, self.momentum) if self.nesterov else M
        return self.orthogonalize(M, SCALES[self.scale](*G.shape[1:]), state, step)

    @abstractmethod
    def orthogonalize(self, M: Tensor, scale: float, state: State, step: Step) -> Tensor:
        """``M [B, m, n]`` with its singular values made equal, times ``scale``, in fresh memory."""


@dataclass(frozen=True, kw_only=True)
class Muon(Orthogonalized):
    """Options as `steepest.Muon` describes them."""

    name: ClassVar[str] = "muon"
    paper: ClassVar[str] = "Jordan et al., https://kellerjordan.github.io/posts/muon"

    def orthogonalize(self, M: Tensor, scale: float, state: State, step: Step) -> Tensor:
        return self.polar(M, step, scale)
