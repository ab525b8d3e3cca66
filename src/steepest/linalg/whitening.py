"""The weights by which KL-Shampoo whitens one side of a gradient for the other side's covariance (arXiv:2509.03378)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def whitening_weights(
    quotients: Tensor, rms: Tensor | None, eps: float, exponent: float, relative_floor: float
) -> Tensor:
    """Compute ``s = λ^exponent [..., d]``, with λ kept away from zero.

    Args:
        quotients: λ, ``[..., d]``, the factor's Rayleigh quotients.
        rms: ``[..., 1]``, the gradient's root mean square; see `root_mean_square`. Not needed where some quotient of
            every factor is known to be positive.
        eps: an absolute floor under λ, if there is no relative one.
        exponent: -1 whitens.
        relative_floor: the least λ as a fraction of the largest; 0: ``eps`` holds.

    Example:
        >>> whitening_weights(torch.tensor([4.0, 1e-9]), torch.ones(1), eps=1e-8, exponent=-1.0, relative_floor=0.25)
        tensor([0.2500, 1.0000])
    """
    if relative_floor == 0:
        return quotients.clamp(min=eps) ** exponent
    largest = quotients.amax(dim=-1, keepdim=True)
    floored = torch.maximum(quotients, relative_floor * largest)
    if rms is None:
        return floored**exponent
    # A factor that is still zero whitens nothing; the gradient's scale stands in for its eigenvalues.
    floored = torch.where(largest > 0, floored, rms.expand_as(floored))
    return torch.where(floored > 0, floored, 1) ** exponent


def root_mean_square(grad: Tensor) -> Tensor:
    """The root mean square ``[..., 1]`` of matrices ``[..., m, n]``."""
    flat = grad.flatten(-2)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    return norm / math.sqrt(flat.shape[-1])
