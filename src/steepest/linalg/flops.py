"""FLOPs of the dense algebra: leading terms, a multiplication and an addition counting as two.

Counts of decompositions are those of Golub and Van Loan, Matrix Computations, 4th edition. A product whose result is
symmetric counts whole, as `torch.utils.flop_counter` counts it, although half of it would do. How long a FLOP takes is
another matter: in a decomposition several times as long as in a product. So FLOPs are counted by what they are part of
(`Work`), and whoever knows a machine makes seconds of them.

  m, n, k, d   sides of matrices
  s, l         the shorter and the longer side
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from steepest.linalg.orthonormal import EXTRA_ROWS, OVERSAMPLING
from steepest.linalg.polar import GRAM_ASPECT, GRAM_STEPS, TABLES

PRODUCT, QR, CHOLESKY, EIGH, SVD = KINDS = ("product", "qr", "cholesky", "eigh", "svd")
"""What FLOPs are part of; "cholesky": its decomposition, and triangular solves."""


@dataclass(frozen=True)
class Part:
    """What tells how long a FLOP takes."""

    kind: str
    """One of `KINDS`."""
    size: int
    """Of a product the geometric mean of its three sides; else columns of what is decomposed."""
    precision: str = ""
    """Of products: "highest", "high", "medium" of float32 ones (`steepest.linalg.precision`), "bfloat16"; "" is
    whatever is in force around."""
    period: int = 1
    """In every so many steps once."""


@dataclass(frozen=True)
class Work:
    """FLOPs of a step on the average, by part. It adds up, and scales.

    >>> work = product(2, 2, 2) + 3 * eigh(2).every(6)
    >>> work.total, work.now().total, work.always().total
    (52.0, 232.0, 16.0)
    """

    parts: Mapping[Part, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        parts = dict(self.parts)
        for part, flops in other.parts.items():
            parts[part] = parts.get(part, 0.0) + flops
        return Work(parts)

    def __mul__(self, times: float) -> Work:
        return Work({part: times * flops for part, flops in self.parts.items()})

    __rmul__ = __mul__

    @property
    def total(self) -> float:
        """All FLOPs, whatever they are part of; the same in whatever order they were added."""
        return math.fsum(self.parts.values())

    def every(self, period: int) -> Work:
        """The same, done once in so many steps."""
        return self._each(lambda part: replace(part, period=part.period * period)) * (1 / period)

    def at(self, precision: str) -> Work:
        """The same, its products computed at a precision, unless they have one already."""
        return self._each(
            lambda part: replace(part, precision=precision) if (part.kind, part.precision) == (PRODUCT, "") else part
        )

    def always(self) -> Work:
        """What is done at every step."""
        return Work({part: flops for part, flops in self.parts.items() if part.period == 1})

    def now(self) -> Work:
        """A step in which everything is done that is ever done."""
        return total(Work({replace(part, period=1): part.period * flops}) for part, flops in self.parts.items())

    def _each(self, change: Callable[[Part], Part]) -> Work:
        return total(Work({change(part): flops}) for part, flops in self.parts.items())


def total(works: Iterable[Work]) -> Work:
    """All of them together; nothing, if there are none."""
    return sum(works, Work())


def product(m: int, k: int, n: int) -> Work:
    """Of ``[m, k]`` and ``[k, n]``: 2mkn.

    >>> product(2, 3, 4).total
    48.0
    """
    return _part(PRODUCT, round((m * k * n) ** (1 / 3)), 2.0 * m * k * n)


def qr(m: int, n: int) -> Work:
    """Householder's reflections of ``[m, n]``, m >= n, and n orthonormal columns from them: twice 2mn² - 2n³/3.

    For square matrices that is 8d³/3 (section 5.2).

    >>> qr(3, 3).total == 8 / 3 * 3**3
    True
    """
    return _part(QR, n, 2 * (2.0 * m * n**2 - 2 / 3 * n**3))


def cholesky(d: int, rows: int) -> Work:
    """Of a symmetric ``[d, d]``, d³/3 (section 4.2), and a triangular solve for a matrix of so many rows, d² each."""
    return _part(CHOLESKY, d, d**3 / 3 + float(rows) * d**2)


def eigh(d: int) -> Work:
    """All eigenvectors of a symmetric matrix: 9d³ (section 8.3)."""
    return _part(EIGH, d, 9.0 * d**3)


def iteration(d: int, steps: int = 1) -> Work:
    """`steepest.linalg.eigenbasis.orthogonal_iteration`: a product and a QR decomposition, 2d³ + 8d³/3, each step."""
    return steps * (product(d, d, d) + qr(d, d))


def refresh(d: int, solver: str, steps: int = 1) -> Work:
    """An eigenbasis that follows, by a solver of `steepest.linalg.solvers`.

    "qr": `iteration`. "cholesky": two products, one of them in full float32, and `cholesky`, 4d³ + 4d³/3; where a
    second pass is needed, that comes on top. "first_order": two products more. "eigh": `eigh`, and a product for the
    order of the old columns.

    >>> refresh(3, "cholesky").total == (4 + 4 / 3) * 3**3
    True
    """
    cube = product(d, d, d)
    if solver == "eigh":
        return eigh(d) + cube
    if solver == "qr":
        return iteration(d, steps)
    return steps * ({"cholesky": 1, "first_order": 3}[solver] * cube + cube.at("highest") + cholesky(d, d))


def turn(d: int, solver: str, steps: int = 1) -> Work:
    """The turn of a factor that is kept in its eigenbasis, `steepest.linalg.turning.turn`.

    "qr": a QR decomposition, and a product for the factor. "eigh": `eigh`, and two products. The others: three, one of
    them for `cholesky`. Of further iterations each takes a product more. All in full float32.

    >>> turn(3, "qr").total == 2 * 3**3 + 8 / 3 * 3**3
    True
    """
    cube = product(d, d, d)
    if solver == "eigh":
        work = eigh(d) + 2 * cube
    else:
        once = qr(d, d) + cube if solver == "qr" else 3 * cube + cholesky(d, d)
        work = steps * once + (steps - 1) * cube
    return work.at("highest")


def turning(d: int, solver: str, steps: int = 1, polish: bool = False) -> Work:
    """A refresh of a factor that is kept in its eigenbasis: its `turn`, and the basis'.

    The basis turns by one product, two more if it is polished, in full float32.

    >>> turning(3, "qr").total == 4 * 3**3 + 8 / 3 * 3**3
    True
    """
    return turn(d, solver, steps) + (3 if polish else 1) * product(d, d, d).at("highest")


def polar(m: int, n: int, method: str, float32: bool = False) -> Work:
    """`steepest.linalg.polar.polar_factor`: 4s²l + 2s³ for a quintic step, 4s²l for a cubic one.

    In float32, and from l = 2s on, steps run on the small Gram matrix: every five 4s²l, and 2s³ for each if quintic,
    6s³ more for each of the five but the first. "exact" is a singular value decomposition, 6s²l + 20s³ (section 8.6),
    and a product.

    >>> polar(100, 400, "keller").total == 20 * 100**2 * 400 + 10 * 100**3
    True
    >>> polar(100, 400, "keller", float32=True).total == 4 * 100**2 * 400 + 34 * 100**3
    True
    """
    s, l = sorted((m, n))
    along, cube = product(s, s, l), product(s, s, s)
    if method == "exact":
        return _part(SVD, s, 6.0 * s**2 * l + 20.0 * s**3) + along
    steps = TABLES[method].steps
    polynomials = sum(1 for _, _, c in steps if c) * cube
    if float32 and l >= GRAM_ASPECT * s:
        runs = math.ceil(len(steps) / GRAM_STEPS)
        work = runs * 2 * along + (len(steps) - runs) * 3 * cube + polynomials
    else:
        work = len(steps) * 2 * along + polynomials
    return work.at("highest" if float32 else "bfloat16")


def orthonormal(m: int, n: int, method: str) -> Work:
    """`steepest.linalg.orthonormal`: "qr", or "rcqr" by a sketch of k rows.

    The sketch 2kmn, the triangle of its QR 2kn² - 2n³/3, a product 2mn², a Cholesky decomposition n³/3 (section 4.2),
    and two triangular solves, mn² each.
    """
    k = math.ceil(OVERSAMPLING * n) + EXTRA_ROWS
    if method == "qr" or k >= m:
        return qr(m, n)
    return product(k, m, n) + 0.5 * qr(k, n) + product(n, m, n) + cholesky(n, 2 * m)


def _part(kind: str, size: int, flops: float) -> Work:
    return Work({Part(kind, size): flops})
