"""KL-SOAP: SOAP in the bases of KL-Shampoo's covariances, where each side of the gradient is whitened by the other.

    L ← β L + (1-β) G R⁻¹ Gᵀ / n,  R ← β R + (1-β) Gᵀ L⁻¹ G / m

Lin et al., arXiv:2509.03378. Checked in tests/reference/test_soap.py. All else is SOAP's; see `steepest.rules.soap`.

  L, R  [B, m, m], [B, n, n]  the covariances as the state holds them: in the coordinates of their bases, Q_Lᵀ L Q_L
                              and Q_Rᵀ R Q_R. Their diagonals are the eigenvalues that the other side is whitened by,
                              and the gradient that they take in is the projected one, which Adam needs as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steepest.rule import State, Step, checked, number
from steepest.rules.parts.kl_factors import KLFactors
from steepest.rules.soap import AdamInBasis


@dataclass(frozen=True, kw_only=True)
class KLSoap(AdamInBasis[KLFactors]):
    """Options as `steepest.SOAP` describes them."""

    name: ClassVar[str] = "kl_soap"
    paper: ClassVar[str] = "Lin et al., arXiv:2509.03378"

    kl_floor: float = checked(1e-4, lambda x: number(x) and 0 <= x < 1, "in [0, 1); 0 means the absolute eps")

    def init(self, G: Tensor) -> State:
        return KLFactors.marked(super().init(G))

    def factors(self, state: State, step: Step) -> KLFactors:
        return KLFactors(state, step.failures, polish=self.basis_dtype != "float32")

    def update_factors(self, G: Tensor, factors: KLFactors, step: Step) -> None:
        factors.accumulate_whitened(G, self.factor_beta(step), self.eps, self.kl_floor)
