"""Poison: gradients that arrive with NaN or infinite entries, as from one bad batch or a failing device."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

KINDS = (math.nan, math.inf, -math.inf)
MOST = 8  # entries of one gradient


class Poison:
    """Strikes each parameter's gradient with probability ``share`` at each step.

    What is struck gets one to `MOST` bad entries of one kind; kinds take turns. All is drawn from a generator of its
    own, so that a poisoned run sees the batches and initial weights of the clean one, and contenders are struck alike.

    Args:
        share: probability in [0, 1]; 0 never strikes.
        seed: the trial's.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2, 3))
        >>> p.grad = torch.ones(2, 3)
        >>> Poison(1.0, seed=0).strike([p])
        1
        >>> bool(torch.isfinite(p.grad).all())
        False
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"poison {seed}".encode()))
        self.kinds = itertools.cycle(KINDS)

    def strike(self, params: Iterable[Tensor]) -> int:
        """Poison some of the gradients in place, and return how many."""
        if not self.share:
            return 0
        grads = [p.grad for p in params if p.grad is not None and p.numel()]
        struck = (torch.rand(len(grads), generator=self.generator) < self.share).tolist()
        for grad in itertools.compress(grads, struck):
            count = int(torch.randint(1, MOST + 1, (), generator=self.generator))
            places = torch.randint(grad.numel(), (count,), generator=self.generator)
            grad.put_(places.to(grad.device), grad.new_full((count,), next(self.kinds)))
        return sum(struck)
