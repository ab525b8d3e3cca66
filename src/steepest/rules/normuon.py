"""NorMuon: Muon, with its rows made equally long in the long run.

Orthogonalized matrices that are not square have rows of very different lengths. NorMuon divides each by the root of a
second moment of its own, as Adam does, and keeps the norm of the whole. Li et al., arXiv:2510.05491, Algorithm 1.
Checked against its authors' numbers in tests/reference/test_normuon.py.

    O = polar(momentum)
    v ← β₂ v + (1-β₂) mean(O², along the row)
    D = O / sqrt(v), with the Frobenius norm of O, times Muon's scale

  O  [B, m, n]  polar factor
  v  [B, m, 1]  second moments of its rows; [B, 1, n] of its columns     state: exp_avg_sq
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.rule import State, Step, beta, lays_out, one_of
from steepest.rule.words import Axis
from steepest.rules.muon import Orthogonalized
from steepest.rules.parts.scales import frobenius, with_norm

TINY = 1e-8
"""Added to sqrt(v), which is about 1 / sqrt(max(m, n)) wherever there is a gradient at all."""


@dataclass(frozen=True, kw_only=True)
class NorMuon(Orthogonalized):
    """Options as `steepest.NorMuon` describes them."""

    name: ClassVar[str] = "normuon"
    paper: ClassVar[str] = "Li et al., arXiv:2510.05491"

    beta2: float = beta(0.95)
    axis: Axis = lays_out(one_of(Axis, "rows"))

    def init(self, G: Tensor) -> State:
        return super().init(G) | {"exp_avg_sq": torch.zeros_like(G.narrow(self.dim, 0, 1))}

    def orthogonalize(self, M: Tensor, scale: float, state: State, step: Step) -> Tensor:
        return equalize(self.polar(M, step), state["exp_avg_sq"], self.beta2, self.dim, scale)

    @property
    def dim(self) -> int:
        """Along which dimension a row (or column) lies."""
        return -1 if self.axis == "rows" else -2


def equalize(O: Tensor, v: Tensor, beta2: float, dim: int, scale: float = 1.0) -> Tensor:
    """``O / sqrt(v)``, as long as ``scale · O [B, m, n]``, once ``v``, its second moments along ``dim``, know of it."""
    v.lerp_(O.square().mean(dim=dim, keepdim=True), 1 - beta2)  # its bias is a factor, which the norm takes out
    return with_norm(O / (v.sqrt() + TINY), scale * frobenius(O))
