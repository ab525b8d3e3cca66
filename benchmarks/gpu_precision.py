"""A section of gpu.py: what TF32 and bfloat16 change in an update, by the phase in which products are computed so.

Every variant takes the steps of the same optimizer in float64, on the same gradients: anisotropic, turning slowly, and
one of them 100 times as large. Factors of products are rounded as tensor cores round them, in one phase at a time, on
any device; the last variants let the hardware do it. Two angles tell how far an update is from float64's: of one step
from the same state, and of runs that go on by themselves. These begin once the bases are determined: a first gradient
leaves eigenvalues that are zero or equal, where rounding chooses among bases that are all as good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import refresh
import torch
from gpu_job import Job
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steepest import kernels
from steepest.engine.optimizer import Optimizer
from steepest.engine.phases import Timeline, listening
from steepest.linalg.precision import FACTORS, round_to_tf32
from steepest.rules.parts.kl_factors import MARK

PERIOD, SPIKE = 5, 100.0
PHASES = ("project", "feed", "refresh")
RULES: Mapping[str, dict[str, Any]] = {"soap": {}, "kl": {"use_kl_shampoo": True}}
TURNED, LOST, LEFT = 1.0, 1e-3, 1.05
"""What is suggested turns updates by at most so many degrees, by their medians; its bases are orthonormal to this, and
leave at most so many times as much off the diagonal as float32's. Of a refresh only the bases count: one that is as
good but another turns updates, too."""


@dataclass
class Variant:
    """How products are computed."""

    name: str
    rounding: Mapping[str, str] = field(default_factory=dict)
    """By phase, "tf32" or "bfloat16"; what is not there is float32."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the optimizer, by which the hardware does it."""


def variants() -> Iterator[Variant]:
    """Float32 first: what the others are compared with."""
    yield Variant("float32")
    for precision in ("tf32", "bfloat16"):
        for phase in PHASES:
            yield Variant(f"{phase} {precision}", {phase: precision})
        yield Variant(f"all {precision}", dict.fromkeys(PHASES, precision))
    yield Variant(
        "project, feed bfloat16, refresh tf32", {"project": "bfloat16", "feed": "bfloat16", "refresh": "tf32"}
    )
    yield Variant("as it comes", options={"qr_fp32_matmul_prec": "high"})
    for word in ("high", "medium"):
        yield Variant(f"hardware {word}", options={"fp32_matmul_prec": word, "qr_fp32_matmul_prec": word})


def measure(job: Job) -> None:
    """A row for each variant, and what is suggested for each phase."""
    rows: list[dict[str, Any]] = job.figures.setdefault("rows", [])
    spent = 0.0
    for rule, options in RULES.items():
        for variant in variants():
            if job.fits(f"{rule}: {variant.name}", spent):
                start = job.clock()
                rows.append({"rule": rule, "variant": variant.name} | compare(variant, options, job))
                spent = job.clock() - start
        job.figures["suggested"] = suggest(rows)
        job.keep()


def suggest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """By rule and phase, the coarsest precision that is still near float32, in one step and long after the spike."""
    found: dict[str, dict[str, str]] = {}
    for rule in dict.fromkeys(row["rule"] for row in rows):
        by_name = {row["variant"]: row for row in rows if row["rule"] == rule}
        for phase in PHASES:
            fine = by_name.get("float32")
            chosen = "float32"
            for precision in ("tf32", "bfloat16"):
                row = by_name.get(f"{phase} {precision}")
                if fine is None or row is None or not row["orthogonality"] <= LOST:
                    break
                if not row["off_diagonal"] <= LEFT * fine["off_diagonal"]:
                    break
                angles = ("one_step_degrees", "at_refresh_degrees", "run_degrees")
                if phase != "refresh" and not all(row[name] <= max(TURNED, fine[name]) for name in angles):
                    break
                chosen = precision
            found.setdefault(rule, {})[phase] = chosen
    return found


def compare(variant: Variant, options: Mapping[str, Any], job: Job) -> dict[str, float]:
    """Angles to float64 in degrees: medians and maxima over steps and matrices; and how orthonormal bases stay."""
    shapes = ((24, 16),) if job.tiny else ((768, 768), (1024, 256))
    steps, begin = (9, 3) if job.tiny else (30, 2 * PERIOD)
    base: dict[str, Any] = {
        "rule": "soap",
        "lr": 1e-3,
        "precondition_frequency": PERIOD,
        "weight_decay": 0.0,
        **options,
    }
    coarse = {"fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest", **variant.options}
    exact = _Run(shapes, job.device, torch.float64, base)
    alone, led = (_Run(shapes, job.device, torch.float32, base | coarse) for _ in range(2))
    one_step: dict[int, list[float]] = {}
    whole_run: dict[int, list[float]] = {}
    gradients = [Gradients(shape, job.device, seed) for seed, shape in enumerate(shapes)]
    with kernels.use("never"):  # they would not be seen by the mode that rounds
        for k in range(steps):
            grads = [one.next(SPIKE if k == steps // 2 else 1.0) for one in gradients]
            led.take_from(exact)
            if k <= begin:
                alone.take_from(exact)
            wanted = exact.step(grads)
            for run, angles in ((led, one_step), (alone, whole_run)):
                with rounded(variant.rounding) if variant.rounding else nullcontext():
                    updates = run.step(grads)
                angles[k] = [angle(u, v) for u, v in zip(updates, wanted, strict=True)]
    each = [a for k, angles in one_step.items() if k >= begin for a in angles]
    refreshed = [a for k, angles in one_step.items() if k >= begin and k % PERIOD == 0 for a in angles]
    late = [a for k, angles in whole_run.items() if k >= steps - steps // 3 for a in angles]
    return {
        "one_step_degrees": statistics.median(each),
        "one_step_degrees_max": max(each),
        "at_refresh_degrees": statistics.median(refreshed),
        "run_degrees": statistics.median(late),
        "run_degrees_max": max(late),
        "orthogonality": alone.orthogonality(),
        "off_diagonal": alone.off_diagonal(exact),
    }


class Gradients:
    """``A_L · noise · A_Rᵀ`` with singular values of A falling as i^-1/2, and turning a little at every step."""

    def __init__(self, shape: tuple[int, int], device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.shape = device, shape
        self.sides = [self._side(d) for d in shape]

    def next(self, scale: float) -> Tensor:
        """In float64."""
        (L, turn_L), (R, turn_R) = self.sides
        G = L @ self._normal(*self.shape) @ R.mT
        self.sides = [(turn_L @ L, turn_L), (turn_R @ R, turn_R)]
        return scale * G

    def _side(self, d: int) -> tuple[Tensor, Tensor]:
        A = torch.linalg.qr(self._normal(d, d)).Q * torch.arange(1, d + 1, device=self.device) ** -0.5
        S = 0.003 * self._normal(d, d) / d**0.5
        return A, torch.matrix_exp(S - S.mT)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float64)


class _Run:
    """Weights of zero and an optimizer, in some dtype."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        dtype: torch.dtype,
        options: Mapping[str, Any],
    ) -> None:
        self.params = [nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for shape in shapes]
        self.optimizer = Optimizer(self.params, **options)

    def step(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The updates, in float64; weights are zero again afterwards, so that they round nothing."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.to(p.dtype)
        self.optimizer.step()
        updates = [p.detach().to(torch.float64, copy=True) for p in self.params]
        with torch.no_grad():
            for p in self.params:
                p.zero_()
        return updates

    def take_from(self, other: _Run) -> None:
        """Its state."""
        for p, q in zip(self.params, other.params, strict=True):
            theirs = other.optimizer.state[q]
            for name, x in self.optimizer.state[p].items():
                x.copy_(theirs[name])

    def orthogonality(self) -> float:
        """The largest entry of ``QᵀQ - I`` of any basis."""
        bases = [
            x.double() for p in self.params for name, x in self.optimizer.state[p].items() if name.startswith("Q_")
        ]
        return max(float((Q.mT @ Q - torch.eye(Q.shape[-1], device=Q.device)).abs().max()) for Q in bases)

    def off_diagonal(self, other: _Run) -> float:
        """``‖offdiag(Qᵀ K Q)‖ / ‖K‖`` with its own bases and the other's covariances, on the average."""
        pairs = [
            (_covariance(other.optimizer.state[q], side), self.optimizer.state[p][f"Q_{side}"].double())
            for p, q in zip(self.params, other.params, strict=True)
            for side in ("L", "R")
        ]
        return statistics.fmean(refresh.off_diagonal(K[None], Q[None]) for K, Q in pairs)


def _covariance(state: Mapping[str, Tensor], side: str) -> Tensor:
    """``[d, d]`` in the gradients' coordinates, in which KL does not keep it."""
    K, Q = state[side], state[f"Q_{side}"]
    return Q @ K @ Q.mT if MARK in state else K


def angle(u: Tensor, v: Tensor) -> float:
    """In degrees, without the loss of small ones that a cosine would bring.

    >>> round(angle(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])))
    45
    """
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


@contextmanager
def rounded(phases: Mapping[str, str]) -> Iterator[None]:
    """Inside the ``with`` block factors of float32 products are rounded, in these phases of a step."""
    where = _Where(lambda: None)
    with listening(where), _Rounding(where, phases):
        yield


class _Where(Timeline[None]):
    """Knows which phase it is, and keeps no marks."""

    def note(self) -> None:
        """Nothing to keep."""

    @property
    def phase(self) -> str:
        """The innermost."""
        return self._open[-1]


class _Rounding(TorchDispatchMode):
    """Sees every operation, and rounds what products multiply."""

    def __init__(self, where: _Where, phases: Mapping[str, str]) -> None:
        super().__init__()
        self.where, self.phases = where, phases

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = FACTORS.get(func.overloadpacket)
        precision = self.phases.get(self.where.phase)
        if factors is not None and precision is not None:
            args = tuple(ROUND[precision](arg) if i in factors else arg for i, arg in enumerate(args))
        return func(*args, **(kwargs or {}))


def _round_to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x


ROUND: Mapping[str, Callable[[Tensor], Tensor]] = {"tf32": round_to_tf32, "bfloat16": _round_to_bfloat16}
