"""EKFAC: K-FAC with the second moments of gradients in the eigenbases of its factors, in place of eigenvalues.

    S ← β S + (1-β) E[(Q_Bᵀ G_i Q_A)²]          from G_i, the gradient of one loss term; λ_B λ_Aᵀ at each refresh
    D = Q_B [(Q_Bᵀ M Q_A) / (S + √d (S 11ᵀ/n + 11ᵀ S/m) + d · mean S)] Q_Aᵀ

George et al., arXiv:1806.03884, with K-FAC's factored damping: of S = λ_B λ_Aᵀ it makes the product of λ_B + √d mean
λ_B and λ_A + √d mean λ_A. The authors add a number, damping_form="absolute". All else is form="eigen" of
`steepest.rules.kfac`, which has the legend. So is S where max_precond_dim leaves a side without a basis, as it does
with the long sides of LoRA's factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from steepest.rule import one_of
from steepest.rule.words import SpectrumDamping
from steepest.rules.kfac import LayerFisher


@dataclass(frozen=True, kw_only=True)
class Ekfac(LayerFisher):
    """Options as `steepest.EKFAC` describes them."""

    name: ClassVar[str] = "ekfac"
    paper: ClassVar[str] = "George et al., arXiv:1806.03884"

    damping_form: SpectrumDamping = one_of(SpectrumDamping, "factored")

    @property
    def in_basis(self) -> bool:
        return True
