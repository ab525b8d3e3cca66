"""Gradients whitened in eigenbases, as KL-Shampoo's covariances take them in (arXiv:2509.03378)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from steepest.linalg.symmetric import accumulate_gram

Sides = Sequence[Tensor | None]
"""``[left, right]``; None is the identity."""


def whitening_weights(
    quotients: Tensor, rms: Tensor | None, eps: float, exponent: float, relative_floor: float
) -> Tensor:
    """``s = λ^exponent``, with λ kept away from zero; ``[..., d]``.

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
    """Of matrices ``[..., m, n]``: ``[..., 1]``."""
    flat = grad.flatten(-2)
    norm: Tensor = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    return norm / math.sqrt(flat.shape[-1])


class Projections:
    """``x [..., m, n]`` in the eigenbasis of each side and of both, each computed when it is first asked for.

    >>> seen = Projections(torch.ones(1, 1), [2 * torch.eye(1), 3 * torch.eye(1)])
    >>> seen.whole.item(), seen.rows.item(), seen.columns.item()
    (6.0, 2.0, 3.0)
    """

    def __init__(self, x: Tensor, eigenbasis_list: Sides) -> None:
        self.x = x
        self.left, self.right = eigenbasis_list

    @cached_property
    def rows(self) -> Tensor:
        """``Q_Lᵀ x``."""
        return self.x if self.left is None else self.left.mT @ self.x

    @cached_property
    def columns(self) -> Tensor:
        """``x Q_R``."""
        return self.x if self.right is None else self.x @ self.right

    @cached_property
    def whole(self) -> Tensor:
        """``Q_Lᵀ x Q_R``: a product with the shorter side, beside the one with the longer."""
        if self.left is None or (self.right is not None and self.x.shape[-2] < self.x.shape[-1]):
            return self.columns if self.left is None else self.left.mT @ self.columns
        return self.rows if self.right is None else self.rows @ self.right


def feed_by_quotients(
    factors: Sides,
    G: Tensor,
    beta: float | Tensor,
    eigenbasis_list: Sides,
    options: tuple[float, float, float],
    quotients: Sides,
) -> None:
    """`kronecker.update_kronecker_factors_kl_shampoo` by λ that are kept: to whiten is to scale."""
    (eps, exponent, relative_floor), rms = options, root_mean_square(G)
    projected = Projections(G, eigenbasis_list)
    whitening = [None if λ is None else whitening_weights(λ, rms, eps, exponent, relative_floor) for λ in quotients]
    energy = projected.whole.square()  # [..., m, n]
    for side, (K, λ) in enumerate(zip(factors, quotients, strict=True)):
        if K is None or λ is None:
            continue
        half, entries = (projected.columns, energy) if side == 0 else (projected.rows.mT, energy.mT)  # [..., d, width]
        other, width = whitening[1 - side], half.shape[-1]
        if other is None:
            gained = entries.sum(dim=-1)
        else:
            half = half * other.sqrt().unsqueeze(-2)
            gained = (entries * other.unsqueeze(-2)).sum(dim=-1)  # BLAS would round otherwise in other stacks
        accumulate_gram(K, half, beta, scale=1 / width)
        λ.lerp_(gained / width, (1 - beta).squeeze(-1) if isinstance(beta, Tensor) else 1 - beta)
