"""Numbers that wait on devices until all are read at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readings:
    """Numbers on devices, which are read together: the host waits once for each device."""

    def __init__(self) -> None:
        self.noted: dict[torch.device, list[tuple[tuple[Any, ...], Tensor]]] = {}

    def note(self, key: tuple[Any, ...], x: Tensor) -> None:
        """Have ``x`` read under a key, which need not be unique."""
        self.noted.setdefault(x.device, []).append((key, x.detach().reshape(-1).double()))

    def read(self) -> list[tuple[tuple[Any, ...], list[float]]]:
        """Return the numbers that were noted, with their keys."""
        found: list[tuple[tuple[Any, ...], list[float]]] = []
        for noted in self.noted.values():
            numbers = iter(torch.cat([x for _, x in noted]).tolist())
            found += [(key, [next(numbers) for _ in range(x.numel())]) for key, x in noted]
        return found
