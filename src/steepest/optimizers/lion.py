"""Signs of momentum."""

from __future__ import annotations

from typing import final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.spelling import Params, given


@final
class Lion(Optimizer):
    """The sign of a momentum that looks one step ahead.

    Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675. For parameters of any shape, with
    half of Adam's memory: 4 bytes an entry.

    Args:
        params: tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: learning rate: what every entry moves by. The paper advises a third to a tenth of AdamW's.
        betas: the momentum's share in the step, and its decay.
        weight_decay: strength of the decay, decoupled; as steps are smaller than AdamW's, the paper takes 3 to 10
            times as much.
        nonfinite: see `Muon`.
        stochastic_rounding: see `Muon`.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(3))
        >>> opt = Lion([W], lr=0.1)
        >>> W.grad = torch.tensor([5.0, -0.01, 0.0])
        >>> opt.step()
        >>> W.data
        tensor([-0.1000,  0.1000,  0.0000])
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        nonfinite: str = "skip",
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, "lion", **given(locals()))
