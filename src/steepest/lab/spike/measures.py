"""What the spike study measures on its paths: angles, eigenvalues, and how far two precisions are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steepest.lab.spike.study import GRADIENTS, GUARDS, SOLVERS, Case, Path, Setup, draw, follow, quotients_at
from steepest.rule.words import Precision

BOTH: tuple[Precision, Precision] = ("high", "highest")
OFFSETS = (1, 2, 5, 10)
"""Steps before and after the last basis without the spike, at which angles are listed; at 1 after, the spike is in."""
FLOORS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Relative floors, to see how large one must be."""
ONLY_QUOTIENTS: tuple[Precision, Precision] = ("highest", "high")
ALL_BUT_QUOTIENTS: tuple[Precision, Precision] = ("high", "highest")
"""Precisions of everything else and of the quotients in KL-Shampoo's feed."""


@dataclass(frozen=True)
class Trace:
    """One path in numbers, one per step; angles in degrees."""

    top1: list[float]
    """The top eigenvector against the one before the spike."""
    leading: list[float]
    """The leading eigenvectors against those: the largest principal angle."""
    to_first: list[float]
    """The leading eigenvectors against the leading left singular vectors of the very first gradient."""
    to_truth: list[float]
    """Against the leading eigenvectors of the covariance that the gradients are drawn with; empty if it has none."""
    eigenvalues: list[list[float]]
    """All of L's, descending."""
    lost_left: list[int]
    """Rayleigh quotients of L at or below the floor."""
    lost_right: list[int]
    """The same of R."""
    smallest_right: list[float]
    """The smallest Rayleigh quotient of R, relative to the largest."""
    update_rms: list[float]
    """In learning rates."""


@dataclass(frozen=True)
class Pair:
    """One case at both precisions."""

    traces: dict[str, Trace]
    apart: list[float]
    """``‖L(high) - L(highest)‖ / ‖L(highest)‖`` after each step."""


@dataclass(frozen=True)
class Study:
    """All that was measured."""

    setup: Setup
    pairs: dict[Case, Pair] = field(default_factory=dict)
    quotients: dict[str, dict[tuple[str, str], Trace]] = field(default_factory=dict)
    """By solver: only the quotients in TF32, and everything but them, with the absolute eps."""
    floors: dict[float, float] = field(default_factory=dict)
    """By relative floor: how far REKLS' L is apart between precisions, at the last of the offsets."""

    def trace(self, solver: str, guard: str, precision: str, gradients: str = "isotropic") -> Trace:
        """One path's numbers."""
        return self.pairs[Case(solver, guard, gradients)].traces[precision]

    def after(self, series: Sequence[float], offset: int) -> float:
        """A series' value so many steps after the last basis without the spike (before it if negative)."""
        return series[self.setup.spike_at - 1 + offset]


def study(setup: Setup, news: Callable[[str], None] = lambda what: None) -> Study:
    """Follow every case; ``news`` hears of each before it starts."""
    found = Study(setup)
    for case in cases():
        news(f"{case.gradients}, {GUARDS[case.guard]}, {case.solver}")
        found.pairs[case] = compare(case, setup)
    short = cut(setup)
    for solver in SOLVERS:
        news(f"which product, {solver}")
        found.quotients[solver] = {}
        for rest, quotients in (ONLY_QUOTIENTS, ALL_BUT_QUOTIENTS):
            case = Case(solver, "absolute")
            with quotients_at(quotients):
                found.quotients[solver][rest, quotients] = trace(follow(case, rest, short), case, short)
    for floor in FLOORS:
        news(f"floor {floor:g}")
        pair = compare(Case("REKLS", "relative", floor=floor), short)
        found.floors[floor] = found.after(pair.apart, OFFSETS[-1])
    return found


def cases() -> Iterator[Case]:
    """Those that are followed all the way."""
    return (Case(solver, guard, gradients) for gradients in GRADIENTS for guard in GUARDS for solver in SOLVERS)


def cut(setup: Setup) -> Setup:
    """The same study, no longer than the tables look."""
    return replace(setup, steps=setup.spike_at + OFFSETS[-1])


def compare(case: Case, setup: Setup) -> Pair:
    """Follow a case at both precisions."""
    paths = {precision: follow(case, precision, setup) for precision in BOTH}
    high, highest = (paths[precision].L for precision in BOTH)
    apart = torch.linalg.matrix_norm(high - highest) / torch.linalg.matrix_norm(highest)
    return Pair({precision: trace(path, case, setup) for precision, path in paths.items()}, apart.tolist())


def trace(path: Path, case: Case, setup: Setup) -> Trace:
    """A path's numbers."""
    G, truth = draw(case.gradients, setup)
    before = path.Q[setup.spike_at - 1]  # [m, m]
    leading = path.Q[..., : setup.top]  # [T, m, top]
    first = torch.linalg.svd(G[0]).U[:, : setup.top]
    return Trace(
        top1=largest_angle(path.Q[..., :1], before[:, :1]).tolist(),
        leading=largest_angle(leading, before[:, : setup.top]).tolist(),
        to_first=largest_angle(leading, first).tolist(),
        to_truth=[] if truth is None else largest_angle(leading, truth).tolist(),
        eigenvalues=torch.linalg.eigvalsh(path.L.double()).flip(-1).tolist(),
        lost_left=path.lost[:, 0].tolist(),
        lost_right=path.lost[:, 1].tolist(),
        smallest_right=path.smallest[:, 1].tolist(),
        update_rms=path.update_rms.tolist(),
    )


def largest_angle(P: Tensor, Q: Tensor) -> Tensor:
    """The largest principal angle between the column spaces of P and Q ``[..., m, k]``, orthonormal, in degrees.

    From its sine and its cosine: float32's arccosine knows no angles between 0 and 0.02 degrees.

    >>> P, Q = torch.eye(3)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> largest_angle(P, Q), largest_angle(P, P)
    (tensor(90., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    P, Q = P.double(), Q.double()
    cosine = torch.linalg.svdvals(Q.mT @ P)[..., -1]
    sine = torch.linalg.matrix_norm(P - Q @ (Q.mT @ P), ord=2)
    return torch.atan2(sine, cosine).rad2deg()
