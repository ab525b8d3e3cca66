"""FLOPs of the dense algebra: leading terms, a multiplication and an addition counting as two.

Counts of decompositions are those of Golub and Van Loan, Matrix Computations, 4th edition. A product whose result is
symmetric counts whole, as `torch.utils.flop_counter` counts it, although half of it would do. How long a FLOP takes is
another matter: in a decomposition several times as long as in a product.

  m, n, k, d   sides of matrices
  s, l         the shorter and the longer side
"""

from __future__ import annotations

import math

from steepest.linalg.orthonormal import EXTRA_ROWS, OVERSAMPLING
from steepest.linalg.polar import GRAM_ASPECT, GRAM_STEPS, TABLES


def product(m: int, k: int, n: int) -> float:
    """Of ``[m, k]`` and ``[k, n]``: 2mkn.

    >>> product(2, 3, 4)
    48.0
    """
    return 2.0 * m * k * n


def qr(m: int, n: int) -> float:
    """Householder's reflections of ``[m, n]``, m >= n, and n orthonormal columns from them: twice 2mn² - 2n³/3.

    For square matrices that is 8d³/3 (section 5.2).

    >>> qr(3, 3) == 8 / 3 * 3**3
    True
    """
    return 2 * (2.0 * m * n**2 - 2 / 3 * n**3)


def eigh(d: int) -> float:
    """All eigenvectors of a symmetric matrix: 9d³ (section 8.3)."""
    return 9.0 * d**3


def iteration(d: int, steps: int = 1) -> float:
    """`steepest.linalg.eigenbasis.orthogonal_iteration`: a product and a QR decomposition, 2d³ + 8d³/3, each step."""
    return steps * (product(d, d, d) + qr(d, d))


def polar(m: int, n: int, method: str, float32: bool = False) -> float:
    """`steepest.linalg.polar.polar_factor`: 4s²l + 2s³ for a quintic step, 4s²l for a cubic one.

    In float32, and from l = 2s on, steps run on the small Gram matrix: every five 4s²l, and 2s³ for each if quintic,
    6s³ more for each of the five but the first. "exact" is a singular value decomposition, 6s²l + 20s³ (section 8.6),
    and a product.

    >>> polar(100, 400, "keller") == 20 * 100**2 * 400 + 10 * 100**3
    True
    >>> polar(100, 400, "keller", float32=True) == 4 * 100**2 * 400 + 34 * 100**3
    True
    """
    s, l = sorted((m, n))
    along, cube = product(s, s, l), product(s, s, s)
    if method == "exact":
        return 6.0 * s**2 * l + 20.0 * s**3 + along
    steps = TABLES[method].steps
    polynomials = sum(cube for _, _, c in steps if c)
    if float32 and l >= GRAM_ASPECT * s:
        runs = math.ceil(len(steps) / GRAM_STEPS)
        return runs * 2 * along + (len(steps) - runs) * 3 * cube + polynomials
    return len(steps) * 2 * along + polynomials


def orthonormal(m: int, n: int, method: str) -> float:
    """`steepest.linalg.orthonormal`: "qr", or "rcqr" by a sketch of k rows.

    The sketch 2kmn, the triangle of its QR 2kn² - 2n³/3, a product 2mn², a Cholesky decomposition n³/3 (section 4.2),
    and two triangular solves, mn² each.
    """
    k = math.ceil(OVERSAMPLING * n) + EXTRA_ROWS
    if method == "qr" or k >= m:
        return qr(m, n)
    return product(k, m, n) + qr(k, n) / 2 + product(n, m, n) + n**3 / 3 + 2.0 * m * n**2
