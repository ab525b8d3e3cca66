"""Lion."""

from __future__ import annotations

from typing import Unpack, final

from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.optimizers.shared import GroupOptions, Params, sets_options
from steepest.rule.words import MomentDtype


@final
class Lion(Optimizer):
    """Lion moves every entry by the sign of a momentum that looks one step ahead.

    Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, Algorithm 2. It takes parameters of
    any shape, and keeps 4 bytes an entry, half of Adam's.

    Args:
        params: Tensors, dicts defining parameter groups, or ``(name, tensor)`` pairs.
        lr: The learning rate, by which every entry moves. The paper recommends a third to a tenth of AdamW's.
        betas: The weight of the momentum in the update, and its decay rate.
        weight_decay: The strength of the decoupled weight decay. The paper recommends 3 to 10 times AdamW's, as the
            learning rate is smaller.
        moment_dtype: "int8" stores the momentum in 1.06 bytes an entry instead of 4, in blocks of 64 of a row with
            a scale each (docs/memory.md). Rows have one index of the first dimension. Vectors stay in float32. It can't
            change while there is state.
        options: `GroupOptions`.

    Example:
        >>> import torch
        >>> W = torch.nn.Parameter(torch.zeros(3))
        >>> opt = Lion([W], lr=0.1)
        >>> W.grad = torch.tensor([5.0, -0.01, 0.0])
        >>> opt.step()
        >>> W.data
        tensor([-0.1000,  0.1000,  0.0000])
    """

    @sets_options("lion")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        *,
        moment_dtype: MomentDtype = "float32",
        **options: Unpack[GroupOptions],
    ) -> None: ...
