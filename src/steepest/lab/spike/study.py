"""What one gradient, a thousand times too large, does to the eigenbases of KL-Shampoo's covariances.

A study of one matrix, whose gradients are drawn and do not depend on its weight. It follows L, the covariance of the
matrix' rows, and its eigenbasis Q_L: for the same gradients at two precisions, "high" (TF32, emulated where the device
has none) and "highest" (float32), by two solvers, under three guards against the spike. L is the covariance itself, not
in its eigenbasis. docs/spike.md explains the findings.

  G       [T, m, n]  gradients of T steps
  L, Q_L  [T, m, m]  covariance and eigenbasis after each step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from steepest import functional
from steepest.engine.optimizer import Optimizer
from steepest.linalg.eigenbasis import conjugate
from steepest.linalg.precision import fp32_matmul_precision, has_tf32, tf32_emulated
from steepest.rule import State, Step
from steepest.rules import RULES
from steepest.rules.kl_soap import KLSoap
from steepest.rules.parts.factors import Factors
from steepest.rules.soap import AdamInBasis

SOLVERS = ("SOAP-KL", "REKLS")  # one orthogonal iteration a step, and a full eigendecomposition
GUARDS = {"absolute": "absolute eps", "relative": "relative floor", "clipped": "floor, clipped"}
"""Lower bounds on what the whitening divides by; "clipped" also clips gradients to the norm of the first."""
GRADIENTS = ("isotropic", "directional")
"""Independent normal entries, whose covariance prefers no direction, and a few strong directions on either side."""

EPS: float = KLSoap.defaults()["eps"]
FLOOR: float = KLSoap.defaults()["kl_floor"]
STRONG = (15.0, 10.0)
"""Scales of the strongest and the weakest strong direction of directional gradients; the others have scale 1."""
PRECISIONS = ("high", "highest")
OFFSETS = (1, 2, 5, 10)
"""Steps before and after the last basis without the spike, at which angles are listed; 1 after, the spike is in."""
FLOORS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # relative floors, to see how large a floor must be
ONLY_QUOTIENTS, ALL_BUT_QUOTIENTS = ("highest", "high"), ("high", "highest")
"""Precisions of KL-Shampoo's Rayleigh quotients (second) and of everything else (first)."""


@dataclass(frozen=True, kw_only=True)
class LiteralKLSoap(AdamInBasis[Factors]):
    """KL-SOAP by the formula as it is written: L and R are the covariances, and their quotients come from a product."""

    name: ClassVar[str] = "kl_soap_literal"

    kl_floor: float = FLOOR

    def factors(self, state: State, step: Step) -> Factors:
        """See `steepest.rule.Refreshing`."""
        return Factors(state, step.failures)

    def update_factors(self, G: Tensor, factors: Factors, step: Step) -> None:
        """See `steepest.rule.Refreshing`."""
        L, R, Q_L, Q_R = (factors.state[name] for name in ("L", "R", "Q_L", "Q_R"))
        functional.update_kronecker_factors_kl_shampoo(
            [L, R], G, self.factor_beta(step), [Q_L, Q_R], self.eps, relative_floor=self.kl_floor
        )


@dataclass(frozen=True)
class Setup:
    """Sizes and times of the study. Steps count from 0."""

    shape: tuple[int, int] = (128, 64)
    steps: int = 100
    spike_at: int = 50
    scale: float = 1000.0
    top: int = 8
    """Number of leading eigenvectors that are followed, and of strong directions in directional gradients."""
    seed: int = 0
    device: str = "cpu"

    @property
    def tf32(self) -> str:
        """How TF32 is computed on this device: emulated or real."""
        return "real" if has_tf32(self.device) else "emulated"


@dataclass(frozen=True)
class Case:
    """A solver, a guard and a kind of gradients, which are followed at each precision."""

    solver: str
    guard: str
    gradients: str = "isotropic"
    floor: float = FLOOR
    """The relative floor, unless the guard is absolute."""

    @property
    def kl_floor(self) -> float:
        """The optimizer's option of this name; 0 means the absolute eps."""
        return 0.0 if self.guard == "absolute" else self.floor


class Path(NamedTuple):
    """The covariance, its basis and the updates along one run, on the CPU, after each of T steps."""

    Q: Tensor  # [T, m, m], eigenbasis of L
    L: Tensor  # [T, m, m], covariance of the rows
    lost: (
        Tensor  # [T, 2], Rayleigh quotients of L and of R at or below the floor; with the absolute eps they weigh 1/eps
    )
    smallest: Tensor  # [T, 2], the smallest Rayleigh quotient of L and of R, relative to the largest
    update_rms: Tensor  # [T], root mean square of the update, in learning rates


def draw(gradients: str, setup: Setup) -> tuple[Tensor, Tensor | None]:
    """Draw the gradients ``[T, m, n]``, with the spike, and return the leading eigenvectors ``[m, top]`` too, if any.

    Directional gradients are ``A Z Bᵀ`` with normal Z, so KL-Shampoo's L should become proportional to ``A Aᵀ``. The
    covariance of isotropic gradients has no leading eigenvectors. Drawn on the CPU, they are the same for all devices.
    """
    generator = torch.Generator().manual_seed(setup.seed)
    G = torch.randn(setup.steps, *setup.shape, generator=generator)  # [T, m, n]
    G[setup.spike_at] *= setup.scale
    if gradients == "isotropic":
        return G, None
    U, V = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for d in setup.shape)
    strong = torch.linspace(*STRONG, setup.top)
    A, B = (X * torch.cat([strong, torch.ones(len(X) - setup.top)]) for X in (U, V))
    return A @ G @ B.mT, U[:, : setup.top]


def follow(case: Case, precision: str, setup: Setup) -> Path:
    """Run one case at one precision, and return its path."""
    G, _ = draw(case.gradients, setup)
    W = torch.zeros(setup.shape, device=setup.device, requires_grad=True)
    options = {"lr": 1.0, "betas": (0.9, 0.95), "shampoo_beta": 0.95, "weight_decay": 0.0, "precondition_frequency": 1}
    options |= {"solver": "eigh" if case.solver == "REKLS" else "auto", "kl_floor": case.kl_floor}
    limit = torch.linalg.matrix_norm(G[0]).item() if case.guard == "clipped" else float("inf")
    steps = []
    with mock.patch.dict(RULES, {LiteralKLSoap.name: LiteralKLSoap}):
        optimizer = Optimizer([W], LiteralKLSoap.name, fp32_matmul_prec=precision, **options)
        with tf32_emulated() if setup.tf32 == "emulated" else nullcontext():
            for gradient in G:
                W.grad = gradient.to(setup.device, copy=True)
                torch.nn.utils.clip_grad_norm_([W], limit)
                before = W.detach().clone()
                optimizer.step()
                state = optimizer.state[W]
                with fp32_matmul_precision(precision):
                    sides = [conjugate(state[side], state[f"Q_{side}"], diag=True) for side in "LR"]
                lost = [(x <= (case.kl_floor * x.max() if case.kl_floor else EPS)).sum() for x in sides]
                smallest = [x.min() / x.max() for x in sides]
                rms = (W.detach() - before).square().mean().sqrt()
                found = state["Q_L"], state["L"], torch.stack(lost), torch.stack(smallest), rms
                steps.append([x.to("cpu", copy=True) for x in found])
    return Path(*map(torch.stack, zip(*steps, strict=True)))


@contextmanager
def quotients_at(precision: str) -> Iterator[None]:
    """Compute the Rayleigh quotients in KL-Shampoo's update, which come from one product, at their own precision."""

    def at(a: Tensor, p: Tensor, diag: bool = False) -> Tensor:
        with fp32_matmul_precision(precision):
            return conjugate(a, p, diag)

    with mock.patch.object(functional, "conjugate", at):
        yield


Trace = dict[str, list[float]]
"""The series of one path by name, each with a number per step: what `trace` returns."""


class Pair(NamedTuple):
    """One case at both precisions."""

    traces: dict[str, Trace]
    apart: list[float]  # ‖L(high) - L(highest)‖ / ‖L(highest)‖ after each step


@dataclass(frozen=True)
class Study:
    """All that was measured."""

    setup: Setup
    pairs: dict[Case, Pair] = field(default_factory=dict)
    quotients: dict[tuple[str, tuple[str, str]], Trace] = field(default_factory=dict)
    """By solver and precisions: only the quotients in TF32, and everything but the quotients, with the absolute eps."""
    floors: dict[float, float] = field(default_factory=dict)
    """By relative floor: how far REKLS' L differs between the precisions at the last of the offsets."""

    def trace(self, solver: str, guard: str, precision: str, gradients: str = "isotropic") -> Trace:
        """Return the numbers of one path."""
        return self.pairs[Case(solver, guard, gradients)].traces[precision]

    def after(self, series: Sequence[float], offset: int) -> float:
        """Return a series' value so many steps after the last basis without the spike, or before if negative."""
        return series[self.setup.spike_at - 1 + offset]

    def apart(self, guard: str) -> float:
        """Return how far L differs between the precisions at the last offset, for the solver that differs more."""
        pairs = (self.pairs[Case(solver, guard)] for solver in SOLVERS)
        return max(self.after(pair.apart, OFFSETS[-1]) for pair in pairs)


def study(setup: Setup, progress: Callable[[str], None] = lambda case: None) -> Study:
    """Follow all cases, and call ``progress`` with the name of each before it starts."""
    found = Study(setup)
    for case in (Case(solver, guard, gradients) for gradients in GRADIENTS for guard in GUARDS for solver in SOLVERS):
        progress(f"{case.gradients}, {GUARDS[case.guard]}, {case.solver}")
        found.pairs[case] = compare(case, setup)
    short = replace(setup, steps=setup.spike_at + OFFSETS[-1])  # as many as the tables show
    for solver in SOLVERS:
        progress(f"which product, {solver}")
        case = Case(solver, "absolute")
        for precisions in (ONLY_QUOTIENTS, ALL_BUT_QUOTIENTS):
            with quotients_at(precisions[1]):
                found.quotients[solver, precisions] = trace(follow(case, precisions[0], short), case, short)
    for floor in FLOORS:
        progress(f"floor {floor:g}")
        pair = compare(Case("REKLS", "relative", floor=floor), short)
        found.floors[floor] = found.after(pair.apart, OFFSETS[-1])
    return found


def compare(case: Case, setup: Setup) -> Pair:
    """Follow a case at both precisions."""
    paths = {precision: follow(case, precision, setup) for precision in PRECISIONS}
    high, highest = (paths[precision].L for precision in PRECISIONS)
    apart = torch.linalg.matrix_norm(high - highest) / torch.linalg.matrix_norm(highest)
    return Pair({precision: trace(path, case, setup) for precision, path in paths.items()}, apart.tolist())


def trace(path: Path, case: Case, setup: Setup) -> Trace:
    """Return the numbers of a path: angles in degrees, and what is known of the covariances."""
    G, truth = draw(case.gradients, setup)
    before = path.Q[setup.spike_at - 1]  # [m, m]
    leading = path.Q[..., : setup.top]  # [T, m, top]
    first = torch.linalg.svd(G[0]).U[:, : setup.top]
    eigenvalues = torch.linalg.eigvalsh(path.L.double())  # [T, m], ascending
    series = {
        "top1_deg": largest_angle(path.Q[..., :1], before[:, :1]),  # of the top eigenvector to the one before the spike
        "leading_deg": largest_angle(leading, before[:, : setup.top]),  # of the leading ones to those before the spike
        "to_first_gradient_deg": largest_angle(leading, first),  # to the first gradient's left singular vectors
        "to_truth_deg": torch.empty(0) if truth is None else largest_angle(leading, truth),
        "quotients_lost_left": path.lost[:, 0],  # Rayleigh quotients of L at or below the floor
        "quotients_lost_right": path.lost[:, 1],  # those of R
        "smallest_quotient_right": path.smallest[:, 1],  # the smallest Rayleigh quotient of R, relative to the largest
        "update_rms": path.update_rms,  # root mean square of the update, in learning rates
        "top_eigenvalue": eigenvalues[:, -1],  # the largest eigenvalue of L
        "eigenvalue_1_to_2": eigenvalues[:, -1] / eigenvalues[:, -2],
    }
    return {name: values.tolist() for name, values in series.items()}


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
