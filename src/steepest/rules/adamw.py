"""AdamW for parameters that are no matrices: torch.optim's own function, in the same optimizer.

Loshchilov and Hutter, arXiv:1711.05101. Embeddings, heads, norms and biases go here; the fused kernel takes the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from steepest.linalg.attempts import at_hand
from steepest.rule import Elementwise, State, at_least, betas, flag, lays_out, one_of
from steepest.rule.words import MomentDtype
from steepest.rules.parts.moments import correction


@dataclass(frozen=True, kw_only=True)
class AdamW(Elementwise):
    """Options as in `torch.optim.AdamW`.

    ``moment_dtype`` "int8" stores the two moments in 2.1 bytes an entry instead of 8, as for `steepest.SOAP`; that of
    ``amsgrad`` and vectors stay in float32.
    """

    name: ClassVar[str] = "adamw"
    paper: ClassVar[str] = "Loshchilov and Hutter, arXiv:1711.05101"

    betas: tuple[float, float] = betas((0.9, 0.999))
    eps: float = at_least(0, 1e-8)
    amsgrad: bool = lays_out(flag(False))
    moment_dtype: MomentDtype = lays_out(one_of(MomentDtype, "float32"))

    def init(self, p: Tensor) -> State:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        return {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names} | {
            "step": torch.zeros((), dtype=torch.float32, device=p.device)
        }

    def apply(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        adamw(
            list(params),
            list(grads),
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if self.amsgrad else [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=self.amsgrad,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr if not isinstance(lr, Tensor) or at_hand(lr) else lr.float(),  # which CUDA's kernel reads
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def latest(self, state: State) -> Tensor:
        t = state["step"]
        v = state["max_exp_avg_sq" if self.amsgrad else "exp_avg_sq"] / correction(self.betas[1], t)
        return state["exp_avg"] / correction(self.betas[0], t) / (v.sqrt() + self.eps)
