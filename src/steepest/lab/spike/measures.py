"""What the spike study measures: angles, eigenvalues, and how far two precisions differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steepest.lab.spike.study import GRADIENTS, GUARDS, SOLVERS, Case, Path, Setup, draw, follow, quotients_at

PRECISIONS = ("high", "highest")
OFFSETS = (1, 2, 5, 10)
"""Steps before and after the last basis without the spike, at which angles are listed; 1 after, the spike is in."""
FLOORS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Relative floors, to see how large a floor must be."""
ONLY_QUOTIENTS, ALL_BUT_QUOTIENTS = ("highest", "high"), ("high", "highest")
"""Precisions of KL-Shampoo's Rayleigh quotients (second) and of everything else (first)."""


@dataclass(frozen=True)
class Trace:
    """The numbers of one path, one per step; angles are in degrees."""

    top1: list[float]
    """Angle of the top eigenvector to the one before the spike."""
    leading: list[float]
    """Largest principal angle of the leading eigenvectors to those before the spike."""
    to_first: list[float]
    """Largest principal angle of the leading eigenvectors to the first gradient's leading left singular vectors."""
    to_truth: list[float]
    """Largest principal angle to the leading eigenvectors of the gradients' true covariance; empty if it has none."""
    eigenvalues: list[list[float]]
    """All eigenvalues of L, descending."""
    lost_left: list[int]
    """Rayleigh quotients of L at or below the floor."""
    lost_right: list[int]
    """Rayleigh quotients of R at or below the floor."""
    smallest_right: list[float]
    """The smallest Rayleigh quotient of R, relative to the largest."""
    update_rms: list[float]
    """Root mean square of the update, in learning rates."""


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
    """By solver: only the quotients in TF32, and everything but the quotients, with the absolute eps."""
    floors: dict[float, float] = field(default_factory=dict)
    """By relative floor: how far REKLS' L differs between the precisions at the last of the offsets."""

    def trace(self, solver: str, guard: str, precision: str, gradients: str = "isotropic") -> Trace:
        """Return the numbers of one path."""
        return self.pairs[Case(solver, guard, gradients)].traces[precision]

    def after(self, series: Sequence[float], offset: int) -> float:
        """Return a series' value so many steps after the last basis without the spike, or before if negative."""
        return series[self.setup.spike_at - 1 + offset]


def study(setup: Setup, progress: Callable[[str], None] = lambda case: None) -> Study:
    """Follow all cases, and call ``progress`` with the name of each before it starts."""
    found = Study(setup)
    for case in (Case(solver, guard, gradients) for gradients in GRADIENTS for guard in GUARDS for solver in SOLVERS):
        progress(f"{case.gradients}, {GUARDS[case.guard]}, {case.solver}")
        found.pairs[case] = compare(case, setup)
    short = cut(setup)
    for solver in SOLVERS:
        progress(f"which product, {solver}")
        found.quotients[solver] = {}
        for rest, quotients in (ONLY_QUOTIENTS, ALL_BUT_QUOTIENTS):
            case = Case(solver, "absolute")
            with quotients_at(quotients):
                found.quotients[solver][rest, quotients] = trace(follow(case, rest, short), case, short)
    for floor in FLOORS:
        progress(f"floor {floor:g}")
        pair = compare(Case("REKLS", "relative", floor=floor), short)
        found.floors[floor] = found.after(pair.apart, OFFSETS[-1])
    return found


def cut(setup: Setup) -> Setup:
    """Return the setup with only as many steps as the tables show."""
    return replace(setup, steps=setup.spike_at + OFFSETS[-1])


def compare(case: Case, setup: Setup) -> Pair:
    """Follow a case at both precisions."""
    paths = {precision: follow(case, precision, setup) for precision in PRECISIONS}
    high, highest = (paths[precision].L for precision in PRECISIONS)
    apart = torch.linalg.matrix_norm(high - highest) / torch.linalg.matrix_norm(highest)
    return Pair({precision: trace(path, case, setup) for precision, path in paths.items()}, apart.tolist())


def trace(path: Path, case: Case, setup: Setup) -> Trace:
    """Return the numbers of a path."""
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
    """Return the largest principal angle between the spans of orthonormal P and Q ``[..., m, k]``, in degrees.

    Sine and cosine both count, because float32's arccosine returns no angles between 0 and 0.02 degrees.

    >>> P, Q = torch.eye(3)[:, :2], torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> largest_angle(P, Q), largest_angle(P, P)
    (tensor(90., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    P, Q = P.double(), Q.double()
    cosine = torch.linalg.svdvals(Q.mT @ P)[..., -1]
    sine = torch.linalg.matrix_norm(P - Q @ (Q.mT @ P), ord=2)
    return torch.atan2(sine, cosine).rad2deg()
