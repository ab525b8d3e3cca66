"""Conjugate gradients for damped and for indefinite systems, which need nothing of a matrix but products with vectors.

    minimize q(x) = ½ xᵀ A x - bᵀ x,  where it has a minimum at A x = b

`conjugate_gradients` stops by Martens' test of relative progress (Martens, "Deep learning via Hessian-free
optimization", ICML 2010, section 4.4), `truncated` at the edge of a trust region or on the first direction of negative
curvature (Steihaug, "The conjugate gradient method and trust regions in large scale optimization", 1983).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steepest.linalg.surroundings import without_autocast
from steepest.newton.products import Product


class Solution(NamedTuple):
    """What an iteration found."""

    x: Tensor
    """The last iterate ``[P]``."""
    value: float
    """q(x), without the preconditioner."""
    products: int
    """The number of products with A."""
    ended: str
    """Why it stopped: "progress", "products" (their maximum), "residual" (nothing is left), "curvature", "boundary", or
    "nonfinite" (a product holds NaN or infinities; x is the iterate before)."""


@without_autocast
def conjugate_gradients(
    product: Product,
    b: Tensor,
    *,
    start: Tensor | None = None,
    preconditioner: Product | None = None,
    products: int = 250,
    progress: float = 5e-4,
    residual: float = 0.0,
) -> Solution:
    """Solve ``A x = b`` for a positive definite A.

    It stops after i iterations when, over the last ``k = max(10, ⌈i/10⌉)`` of them, q fell by less than the fraction
    ``k · progress`` of its value: what counts for an optimizer is q and not the residual.

    Args:
        product: from ``v [P]`` to ``A v``.
        b: ``[P]``.
        start: the first iterate ``[P]``; zero by default, which saves one product.
        preconditioner: from a residual ``[P]`` to an approximation of ``A⁻¹`` times it; it must be symmetric and
            positive definite. None by default.
        products: the largest number of products.
        progress: ε of Martens' test; 0 switches it off. 5e-4 is Martens' own.
        residual: the iteration also stops where ``‖b - A x‖ ≤ residual · ‖b‖``.

    Returns:
        The last iterate. Where A turns out not to be positive definite, the iteration ends with "curvature" and the
        iterate before, which may be the start.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> conjugate_gradients(lambda v: A @ v, torch.tensor([2.0, 4.0]), products=2).x.round(decimals=3)
        tensor([1., 1.])
    """
    x = torch.zeros_like(b) if start is None else start.clone()
    r = b.clone() if start is None else b - product(x)
    count, values = int(start is not None), [_value(x, r, b)]
    small = residual * float(b.norm())
    z = r if preconditioner is None else preconditioner(r)
    p, rz = z.clone(), r.dot(z)
    while True:
        if float(r.norm()) <= small or not float(rz) > 0.0:
            return Solution(x, values[-1], count, "residual")
        if count >= products:
            return Solution(x, values[-1], count, "products")
        Ap = product(p)
        count += 1
        curvature = p.dot(Ap)
        if not float(curvature) > 0.0 or not bool(curvature.isfinite()):
            return Solution(x, values[-1], count, "curvature" if bool(curvature.isfinite()) else "nonfinite")
        a = rz / curvature
        x, r = x + a * p, r - a * Ap
        values.append(_value(x, r, b))
        if _stalls(values, progress):
            return Solution(x, values[-1], count, "progress")
        z = r if preconditioner is None else preconditioner(r)
        rz, before = r.dot(z), rz
        p = z + (rz / before) * p


@without_autocast
def truncated(
    product: Product, b: Tensor, radius: float, *, products: int = 250, residual: float = 0.0, progress: float = 0.0
) -> Solution:
    """Minimize q approximately in the ball ``‖x‖ ≤ radius``; A may be indefinite.

    Iterates start at zero, grow in length and lower q. The first that would leave the ball, or the first direction of
    negative curvature, is followed to the ball's edge, and the iteration ends there.

    Args:
        product: from ``v [P]`` to ``A v``.
        b: ``[P]``, the negative gradient.
        radius: of the ball.
        products: the largest number of products.
        residual: the iteration also ends where ``‖b - A x‖ ≤ residual · ‖b‖``.
        progress: ε of Martens' test, see `conjugate_gradients`; 0 switches it off.

    Example:
        >>> A = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> x, value, products, ended = truncated(lambda v: A @ v, torch.tensor([0.0, 0.1]), radius=3.0)
        >>> x.round(decimals=3), products, ended
        (tensor([0., 3.]), 1, 'curvature')
    """
    x, r = torch.zeros_like(b), b.clone()
    p, rr, count, values = b.clone(), b.dot(b), 0, [0.0]
    small = residual * float(b.norm())
    while True:
        if not float(rr) > small**2:
            return Solution(x, values[-1], count, "residual")
        if count >= products:
            return Solution(x, values[-1], count, "products")
        Ap = product(p)
        count += 1
        curvature = float(p.dot(Ap))
        if not math.isfinite(curvature):
            return Solution(x, values[-1], count, "nonfinite")
        a = rr / curvature if curvature > 0.0 else None
        if a is None or float((x + a * p).norm()) >= radius:
            t = _to_edge(x, p, radius)
            x, r = x + t * p, r - t * Ap
            return Solution(x, _value(x, r, b), count, "curvature" if a is None else "boundary")
        x, r = x + a * p, r - a * Ap
        values.append(_value(x, r, b))
        if _stalls(values, progress):
            return Solution(x, values[-1], count, "progress")
        rr, before = r.dot(r), rr
        p = r + (rr / before) * p


def _value(x: Tensor, r: Tensor, b: Tensor) -> float:
    """q(x), from the residual ``r = b - A x``."""
    return -0.5 * float(x.dot(r + b))


def _stalls(values: list[float], progress: float) -> bool:
    """Martens' test on the values of q so far."""
    i = len(values) - 1
    k = max(10, -(-i // 10))
    return i > k and values[-1] < 0.0 and (values[-1] - values[-1 - k]) / values[-1] < k * progress


def _to_edge(x: Tensor, p: Tensor, radius: float) -> float:
    """The t > 0 with ``‖x + t p‖ = radius``, for x inside."""
    a, half, c = float(p.dot(p)), float(x.dot(p)), float(x.dot(x)) - radius**2
    root = math.sqrt(max(half * half - a * c, 0.0))
    return -c / (half + root) if half > 0.0 else (root - half) / a  # the form without cancellation
