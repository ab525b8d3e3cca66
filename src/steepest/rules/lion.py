"""Lion: the sign of a momentum that looks one step ahead.

Chen et al., arXiv:2302.06675, Algorithm 2. Checked in tests/reference/test_lion.py.

    W ← (1 - lr·wd) W
    W ← W - lr · sign(β₁ m + (1-β₁) g)         sign(0) = 0
    m ← β₂ m + (1-β₂) g

  g, W  gradient and weight, of any shape
  m     momentum                                state: exp_avg
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest.rule import Elementwise, State, betas, lays_out, one_of
from steepest.rule.words import MomentDtype


@dataclass(frozen=True, kw_only=True)
class Lion(Elementwise):
    """Options as `steepest.Lion` describes them."""

    name: ClassVar[str] = "lion"
    paper: ClassVar[str] = "Chen et al., arXiv:2302.06675"

    betas: tuple[float, float] = betas((0.9, 0.99))
    moment_dtype: MomentDtype = lays_out(one_of(MomentDtype, "float32"))

    def init(self, p: Tensor) -> State:
        return {
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
        }

    def apply(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        momenta = [state["exp_avg"] for state in states]
        if params[0].device.type == "cpu":  # one at a time: what was just computed is still in the cache
            for W, g, m in zip(params, grads, momenta, strict=True):
                self.move([W], [g], [m], lr, weight_decay)
        else:  # all at once: one kernel launch for each line of `move`
            self.move(list(params), list(grads), momenta, lr, weight_decay)
        torch._foreach_add_([state["step"] for state in states], 1)

    def move(self, W: list[Tensor], g: list[Tensor], m: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        """Step, decay and remember, in place, for lists of parameters."""
        torch._foreach_mul_(W, 1 - lr * weight_decay)
        D = list(torch._foreach_lerp(m, g, 1 - self.betas[0]))
        torch._foreach_sign_(D)
        torch._foreach_mul_(D, lr)
        torch._foreach_sub_(W, D)
        torch._foreach_lerp_(m, g, 1 - self.betas[1])

    def latest(self, state: State) -> Tensor:
        return state["exp_avg"].sign()  # of the same size: 1 wherever there was a gradient
