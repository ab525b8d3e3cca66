"""The work of a rule: FLOPs of its matrix products and decompositions, counted while it runs on the meta device.

`work` takes one step without a refresh and one with it, and `first_work` the step of the first refresh, on tensors that
have a shape and no values, so a rule must not ask for a value. A product of ``[m, k]`` and ``[k, n]`` counts 2mkn, also
where its result is symmetric and half of that would do. Decompositions count by the leading terms in Golub and Van
Loan, Matrix Computations, 4th edition. FLOPs in float64 count twice, as they take twice the time of float32's.
Elementwise operations count nothing.

A FLOP of a decomposition takes several times as long as one of a product. So FLOPs are counted by `Part`, and the
speeds of a device (`steepest.lab.plan.devices`) turn them into seconds. Where a rule computes differently on different
devices, work is that of a CPU, except that ``ns_dtype="auto"`` counts as float16 where that is allowed.

  m, n, k   sides of a matrix
  s, l      its shorter and its longer side
  d         the side of a square matrix
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.linalg.precision import FACTORS, fp32_matmul_precision
from steepest.rule.refreshing import THE_END, Refreshing
from steepest.rule.rule import Rule, Step, whole

PRODUCT, QR, CHOLESKY, EIGH, SVD = "product", "qr", "cholesky", "eigh", "svd"
"""The kinds of work. Triangular solves belong to "cholesky"."""


@dataclass(frozen=True)
class Part:
    """The properties of a FLOP that determine how long it takes and how often it is done."""

    kind: str
    """One of the five kinds above."""
    size: int
    """The geometric mean of a product's three sides, or the shorter side of a decomposed matrix."""
    precision: str = ""
    """The precision of a product: "bfloat16" (float16 too), or that of float32, "highest", "high" or "medium"; ""
    otherwise."""
    period: int = 1
    """The number of steps in which this work is done once."""


@dataclass(frozen=True)
class Work:
    """FLOPs per step, averaged over a period, by part.

    >>> found = Work({Part(PRODUCT, 2, "highest"): 16.0, Part(EIGH, 2, period=6): 12.0})
    >>> found.total, found.now().total, found.always().total
    (28.0, 88.0, 16.0)
    """

    parts: Mapping[Part, float]

    @property
    def total(self) -> float:
        """The sum over all parts; it does not depend on their order."""
        return math.fsum(self.parts.values())

    def always(self) -> Work:
        """The work of a step without a refresh."""
        return Work({part: flops for part, flops in self.parts.items() if part.period == 1})

    def now(self) -> Work:
        """The work of a step with a refresh."""
        found: defaultdict[Part, float] = defaultdict(float)
        for part, flops in self.parts.items():
            found[replace(part, period=1)] += part.period * flops
        return Work(dict(found))


def work(rule: Rule, m: int, n: int) -> Work:
    """Count the FLOPs of one step of an m × n matrix by a rule, with refreshes spread over their period.

    A refresh frequency that changes over training counts as it is in the end. Results are cached.

    >>> from steepest.rules.muon import Muon
    >>> work(Muon(ns_dtype="bfloat16"), 100, 300).total == 20 * 100**2 * 300 + 10 * 100**3
    True
    """
    try:
        hash(rule)
    except TypeError:  # an option that is a list, say
        return _counted.__wrapped__(rule, m, n)
    return _counted(rule, m, n)


def first_work(rule: Rule, m: int, n: int) -> Work:
    """Count the FLOPs of the step in which an m × n matrix has its first refresh. Results are cached, as in `work`.

    >>> from steepest.rules.soap import Soap
    >>> rule = Soap()
    >>> 1 < first_work(rule, 500, 500).total / work(rule, 500, 500).now().total < 2
    True
    """
    try:
        hash(rule)
    except TypeError:
        return _counted_first.__wrapped__(rule, m, n)
    return _counted_first(rule, m, n)


def counted(function: Callable[..., object], *args: Any) -> Work:
    """Call ``function(*args)`` and count the FLOPs of its products and decompositions.

    >>> counted(torch.linalg.eigh, torch.empty(3, 3, device="meta")).parts
    {Part(kind='eigh', size=3, precision='', period=1): 243.0}
    """
    with torch.inference_mode(False), torch.no_grad(), fp32_matmul_precision("highest"), _FlopCounter() as counter:
        function(*args)
    return Work(dict(counter.flops))


@cache
def _counted_first(rule: Rule, m: int, n: int) -> Work:
    return counted(_step, rule, m, n, True, rule.first_refresh if isinstance(rule, Refreshing) else 0)


@cache
def _counted(rule: Rule, m: int, n: int) -> Work:
    refreshing, period = counted(_step, rule, m, n, True), rule.period(THE_END)
    if period == 1:
        return refreshing
    parts = dict(counted(_step, rule, m, n, False).parts)
    for part, flops in refreshing.parts.items():
        if more := flops - parts.get(part, 0.0):
            parts[replace(part, period=period)] = more / period
    return Work(parts)


def _step(rule: Rule, m: int, n: int, refresh: bool, clock: int = THE_END) -> None:
    """Take one step of an m × n matrix that has had ``clock`` updates."""
    G = torch.empty(1, m, n, dtype=torch.float32, device="meta")
    step = Step(t=G.new_empty(1, 1, 1), stage=rule.stage(clock), refresh=slice(0, 1) if refresh else None)
    state = rule.init(G)
    directions = rule.update(G, state, step)
    if directions is not None:
        whole(directions)
    if rule.defers(step):
        rule.finish(state, step)


def _reflections(m: int, n: int) -> float:
    """Householder's reflections of an m × n matrix: 2s²l - 2s³/3 (section 5.2).

    Forming s orthonormal columns from them takes as many again.
    """
    s, l = sorted((m, n))
    return 2.0 * s**2 * l - 2 / 3 * s**3


def _columns(m: int, n: int, scales: Tensor) -> float:
    """The first n columns of a product of k reflections of m rows: 4mnk - 2(m + n)k² + 4k³/3 (section 5.1.6)."""
    k = scales.shape[-1]
    return 4.0 * m * n * k - 2.0 * (m + n) * k**2 + 4 / 3 * k**3


ATEN = torch.ops.aten
DECOMPOSITIONS: Mapping[Any, tuple[str, Callable[..., float]]] = {
    ATEN.geqrf: (QR, lambda m, n, *_: _reflections(m, n)),
    ATEN.linalg_householder_product: (QR, _columns),
    ATEN.linalg_qr: (QR, lambda m, n, mode="reduced": (1 if mode == "r" else 2) * _reflections(m, n)),
    ATEN.linalg_cholesky_ex: (CHOLESKY, lambda d, *_: d**3 / 3),  # section 4.2
    ATEN.cholesky_inverse: (CHOLESKY, lambda d, *_: 2 / 3 * d**3),  # after the factorization
    ATEN.linalg_solve_triangular: (CHOLESKY, lambda d, _, B: float(d * B.shape[-2] * B.shape[-1])),  # section 3.1
    ATEN._linalg_eigh: (EIGH, lambda d, *_: 9.0 * d**3),  # all eigenvectors, section 8.3
    ATEN._linalg_svd: (SVD, lambda m, n, *_: 6.0 * min(m, n) ** 2 * max(m, n) + 20.0 * min(m, n) ** 3),  # section 8.6
}
"""By operation: its kind, and FLOPs from the sides of the matrix and the operation's further positional arguments."""


PRECISIONS = {torch.bfloat16: "bfloat16", torch.float16: "bfloat16", torch.float64: "highest"}
"""The `Part.precision` of products in other dtypes than float32."""


class _FlopCounter(TorchDispatchMode):
    """Counts FLOPs by part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: defaultdict[Part, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if found := flops_of(func, args):
            self.flops[found[0]] += found[1]
        valueless = args and isinstance(args[0], Tensor) and args[0].is_meta
        return without_values(func, args, kwargs or {}) if valueless else func(*args, **(kwargs or {}))


def flops_of(func: Any, args: Sequence[Any]) -> tuple[Part, float] | None:
    """Return the FLOPs of an operation that a dispatch mode sees, and the part that they belong to; None for others."""
    operation = func.overloadpacket
    if operation in FACTORS:
        A, B = (args[i] for i in FACTORS[operation])
        (m, k), n = A.shape[-2:], B.shape[-1]
        precision = torch.get_float32_matmul_precision() if A.dtype == torch.float32 else PRECISIONS[A.dtype]
        return Part(PRODUCT, round((m * k * n) ** (1 / 3)), precision), _weight(A) * 2.0 * A.numel() * n
    if operation in DECOMPOSITIONS:
        (kind, flops), A = DECOMPOSITIONS[operation], args[0]
        (m, n), batch = A.shape[-2:], A.shape[:-2].numel()
        return Part(kind, min(m, n)), _weight(A) * batch * flops(m, n, *args[1:])
    return None


def without_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on tensors without values, also two that torch doesn't: QR, and choice by a mask."""
    if func.overloadpacket is ATEN.geqrf:
        return torch.empty_like(args[0]), args[0].new_empty(*args[0].shape[:-2], min(args[0].shape[-2:]))
    if func.overloadpacket is ATEN.index:
        args = args[0], [_all_chosen(index) for index in args[1]]
    return func(*args, **kwargs)


def _weight(A: Tensor) -> int:
    """The number that each FLOP counts for in A's dtype."""
    return 2 if A.dtype == torch.float64 else 1


def _all_chosen(index: Tensor | None) -> Tensor | None:
    """The indices that a mask ``[b]`` stands for if all its entries are true; without values, nothing else is known."""
    if index is None or index.dtype != torch.bool or index.dim() != 1:
        return index
    return index.new_empty(len(index), dtype=torch.long)
