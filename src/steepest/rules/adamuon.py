"""AdaMuon: Muon on the signs of the momentum, with Adam's second moment after it.

Si et al., arXiv:2507.11005, Algorithm 1. Checked in tests/reference/test_muon.py.

    O = polar(sign(momentum))                    with sign=False: polar(momentum)
    v ← μ v + (1-μ) O²
    D = O / sqrt(v), with the norm of a polar factor, times Muon's scale

At ``scale="match_rms_adamw"`` the last line is the paper's 0.2 sqrt(mn) / ‖O / sqrt(v)‖.

  O  [B, m, n]  polar factor
  v  [B, m, n]  second moment of its entries, with the momentum's own decay     state: exp_avg_sq
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.rule import State, Step, flag
from steepest.rules.muon import Orthogonalized
from steepest.rules.parts.scales import with_norm

TINY = 1e-8
"""Added to sqrt(v), which is about 1 / sqrt(max(m, n)) wherever there is a gradient at all."""


@dataclass(frozen=True, kw_only=True)
class AdaMuon(Orthogonalized):
    """Options as `steepest.AdaMuon` describes them."""

    name: ClassVar[str] = "adamuon"
    paper: ClassVar[str] = "Si et al., arXiv:2507.11005"

    sign: bool = flag(True)

    def init(self, G: Tensor) -> State:
        return super().init(G) | {"exp_avg_sq": torch.zeros_like(G)}  # [B, m, n]

    def orthogonalize(self, M: Tensor, scale: float, state: State, step: Step) -> Tensor:
        O = self.polar(M.sign() if self.sign else M, step)
        v = state["exp_avg_sq"].lerp_(O.square(), 1 - self.momentum)  # its bias is a factor, which the norm takes out
        return with_norm(O / (v.sqrt() + TINY), scale * min(O.shape[1:]) ** 0.5)  # as a polar factor of full rank
