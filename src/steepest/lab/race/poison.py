"""Poison: gradients that get NaN or infinite entries, as from one bad batch or a failing device."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

KINDS = (math.nan, math.inf, -math.inf)
MOST = 8
"""Largest number of bad entries in one gradient."""


class Poison:
    """Poisons the gradient of each parameter with probability ``share`` in each step.

    A poisoned gradient gets one to `MOST` bad entries of one kind, and the kinds take turns. A generator of its own
    draws them, so that a poisoned run has the batches and initial weights of the clean one, and all contenders have the
    same gradients poisoned.

    Args:
        share: probability in [0, 1].
        seed: the trial's seed.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2, 3))
        >>> p.grad = torch.ones(2, 3)
        >>> Poison(1.0, seed=0).apply([p])
        1
        >>> bool(torch.isfinite(p.grad).all())
        False
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"poison {seed}".encode()))
        self.kinds = itertools.cycle(KINDS)

    def apply(self, params: Iterable[Tensor]) -> int:
        """Poison some of the gradients in place, and return how many."""
        if not self.share:
            return 0
        grads = [p.grad for p in params if p.grad is not None and p.numel()]
        poisoned = (torch.rand(len(grads), generator=self.generator) < self.share).tolist()
        for grad in itertools.compress(grads, poisoned):
            count = int(torch.randint(1, MOST + 1, (), generator=self.generator))
            indices = torch.randint(grad.numel(), (count,), generator=self.generator)
            grad.put_(indices.to(grad.device), grad.new_full((count,), next(self.kinds)))
        return sum(poisoned)
