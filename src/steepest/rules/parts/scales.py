"""How large a step is made: by a number per shape, with a name, or by the norm of another step.

The polar factor of an m × n matrix of full rank has spectral norm 1 and root mean square ``1 / sqrt(max(m, n))``. What
learning rate suits every shape of a network is a matter of convention; these are the conventions in use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest.linalg.polar import negligible_norm

SCALES: dict[str, Callable[[int, int], float]] = {
    # Spectral norm 1, as the geometry has it.
    "none": lambda m, n: 1.0,
    # K. Jordan's: tall matrices step further.
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    # Root mean square 0.2, AdamW's where gradients are noisy, so that rates are alike. Liu et al., arXiv:2502.16982.
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    # Outputs move by as much as inputs are large, at any width. Yang et al., arXiv:2310.17813; Dion's paper.
    "mup": lambda m, n: (m / n) ** 0.5,
}
"""Factors on the polar factor of a matrix with m rows (outputs) and n columns."""

SCALES |= {
    "shape_scaling": SCALES["original"],
    "rms_norm": SCALES["match_rms_adamw"],
    "spectral_norm": SCALES["mup"],
    "unit_rms_norm": SCALES["mup"],
}  # what other libraries call them


def frobenius(X: Tensor) -> Tensor:
    """The Frobenius norm of each matrix of ``X [B, m, n]``, ``[B, 1, 1]``."""
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return norm


def with_norm(D: Tensor, norm: Tensor | float) -> Tensor:
    """``D [B, m, n]``, each matrix scaled to the Frobenius norm ``norm [B, 1, 1]``; zero stays zero.

    Example:
        >>> with_norm(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), 10.0)
        tensor([[[6., 8.]],
        <BLANKLINE>
                [[0., 0.]]])
    """
    old = frobenius(D)
    return torch.where(old > negligible_norm(D.dtype), D * (norm / old), 0)
