"""Sums of second moments: of rows of inputs, of rows of gradients, and of samples' gradients in given bases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg.symmetric import gram

EXACT_ENTRIES = 2**26
"""The most entries of all samples' gradients of a layer for which S is computed from them, where positions share it."""
BLOCK_ENTRIES = 2**24
"""How many of these entries exist at once."""


@dataclass
class Inbox:
    """The sums of one weight since they were last collected, in float32, or float64 where the weight is."""

    A: Tensor | None = None
    """``Σ ā āᵀ [G, n̄, n̄]``."""
    B: Tensor | None = None
    """``Σ δ δᵀ [G, m, m]``."""
    S: Tensor | None = None
    """``Σ_i (Q_Bᵀ G_i Q_A)² [G, m, n̄]``, for the gradients ``G_i`` of single samples."""
    rows: int = 0
    """The number of rows that A sums over."""
    terms: int = 0
    """The number of loss terms as far as a layer can tell."""

    def add_inputs(self, rows: Tensor, sharing: str) -> None:
        """Add rows ``ā [G, N, S, n̄]`` to A: each of them, or for sharing "reduce" the means over S positions."""
        if sharing == "reduce":
            rows = rows.mean(2, keepdim=True)
        self.A = _sum(self.A, gram(rows.flatten(1, 2).mT))
        self.rows += rows.shape[1] * rows.shape[2]

    def add_gradients(self, gradients: Tensor, sharing: str) -> None:
        """Add rows ``δ [G, N, S, m]`` to B: each of them, or for sharing "reduce" the sums over S positions."""
        if sharing == "reduce":
            gradients = gradients.sum(2, keepdim=True)
        self.B = _sum(self.B, gram(gradients.flatten(1, 2).mT))

    def add_second_moments(self, rows: Tensor, gradients: Tensor, Q_A: Tensor, Q_B: Tensor, exact: bool) -> None:
        """Add to S, from ``ā [G, N, S, n̄]``, ``δ [G, N, S, m]`` and bases ``[G, n̄, n̄]``, ``[G, m, m]``.

        Exactly, a sample's gradient is the sum over its positions. Otherwise positions are taken for samples.
        """
        rows, gradients = _in_basis(rows, Q_A), _in_basis(gradients, Q_B)
        if rows.shape[2] == 1 or not exact:
            squares = gradients.flatten(1, 2).square().mT @ rows.flatten(1, 2).square()
            self.S = _sum(self.S, squares)
            return
        samples = max(BLOCK_ENTRIES // (len(rows) * rows.shape[-1] * gradients.shape[-1]), 1)
        for a, d in zip(torch.split(rows, samples, 1), torch.split(gradients, samples, 1), strict=True):
            self.S = _sum(self.S, (d.mT @ a).square_().sum(1))


def _in_basis(rows: Tensor, Q: Tensor) -> Tensor:
    """``rows [G, N, S, d]`` by ``Q [G, d, d]``, in one product for each group."""
    return (rows.flatten(1, 2) @ Q.to(rows)).view(rows.shape)


def _sum(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old.add_(new)


def exactly(samples: int, shape: tuple[int, int, int]) -> bool:
    """Return whether the gradients of all samples, of a layer of this shape, are few enough numbers to be made."""
    G, m, n = shape
    return samples * G * m * n <= EXACT_ENTRIES
