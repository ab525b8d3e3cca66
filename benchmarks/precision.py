"""What TF32 and bfloat16 change in an update of SOAP, by the phase in which products are computed so.

    python benchmarks/precision.py                    # on a CPU, with factors of products rounded as tensor cores do
    python benchmarks/precision.py --device cuda      # the last variants let the hardware do it

Every variant takes the steps of the same optimizer in float64, on the same gradients: anisotropic, turning slowly, and
one of them 100 times as large. In one phase at a time factors of products are rounded. Two angles tell how far an
update is from float64's: of one step from the same state, and of runs that go on by themselves. These begin once
the bases are determined: a first gradient leaves eigenvalues that are zero or equal, where rounding chooses among bases
that are all as good. Of the bases themselves two figures tell: the largest entry of ``QᵀQ - I``, and
``‖offdiag(Qᵀ K Q)‖ / ‖K‖``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import refresh
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steepest import kernels
from steepest.engine.optimizer import Optimizer
from steepest.engine.phases import Timeline, listening
from steepest.linalg.precision import FACTORS, round_to_tf32
from steepest.rules.parts.kl_factors import MARK

PERIOD, SPIKE = 5, 100.0
PHASES = ("project", "factors", "refresh")
RULES: Mapping[str, dict[str, Any]] = {"soap": {}, "kl": {"rule": "kl_soap"}}
SHAPES, STEPS = ((768, 768), (1024, 256)), 30
Shape = tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """A way to compute products."""

    name: str
    rounding: Mapping[str, str] = field(default_factory=dict)
    """By phase, "tf32" or "bfloat16"; other phases are float32."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the optimizer, by which the hardware does it."""


VARIANTS = (
    Variant("float32"),
    *(
        Variant(f"{' '.join(phases) if len(phases) == 1 else 'all'} {precision}", dict.fromkeys(phases, precision))
        for precision in ("tf32", "bfloat16")
        for phases in (*((phase,) for phase in PHASES), PHASES)
    ),
    Variant("hardware high", options={"fp32_matmul_prec": "high", "qr_fp32_matmul_prec": "high"}),
    Variant("hardware medium", options={"fp32_matmul_prec": "medium", "qr_fp32_matmul_prec": "medium"}),
)
"""The variants; the others are compared with the first."""


def compare(
    variant: Variant, rule: str, device: torch.device, shapes: Sequence[Shape] = SHAPES, steps: int = STEPS
) -> dict[str, Any]:
    """Return the angles of a variant's updates to float64's in degrees, and how good its bases are."""
    base = {"rule": "soap", "lr": 1e-3, "precondition_frequency": PERIOD, "weight_decay": 0.0, **RULES[rule]}
    coarse = {"fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest", **variant.options}
    exact = Run(shapes, device, torch.float64, base)
    alone, led = (Run(shapes, device, torch.float32, base | coarse) for _ in range(2))
    begin = min(2 * PERIOD, steps // 3)
    one_step: list[float] = []
    at_refresh: list[float] = []
    late: list[float] = []
    gradients = [Gradients(shape, device, seed) for seed, shape in enumerate(shapes)]
    with kernels.use("never"):  # the mode that rounds would not see them
        for k in range(steps):
            grads = [one.next(SPIKE if k == steps // 2 else 1.0) for one in gradients]
            led.take_from(exact)
            if k <= begin:
                alone.take_from(exact)
            wanted = exact.step(grads)
            with rounded(variant.rounding):
                near, far = (
                    [angle(*pair) for pair in zip(run.step(grads), wanted, strict=True)] for run in (led, alone)
                )
                one_step += near if k >= begin else []
                at_refresh += near if k >= begin and k % PERIOD == 0 else []
                late += far if k >= steps - steps // 3 else []
    found = {
        "rule": rule,
        "variant": variant.name,
        "one step": statistics.median(one_step),
        "its maximum": max(one_step),
    }
    found |= {"at a refresh": statistics.median(at_refresh), "a run": statistics.median(late)}
    return found | {"orthogonality": alone.orthogonality(), "off the diagonal": alone.off_diagonal(exact)}


class Gradients:
    """Gradients ``A_L · noise · A_Rᵀ``, where A has singular values i^-1/2 and turns a little at every step."""

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.shape = device, shape
        self.sides = [self._side(d) for d in shape]

    def next(self, scale: float) -> Tensor:
        """Return the next gradient, in float64."""
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


class Run:
    """Weights of zero and an optimizer, in some dtype."""

    def __init__(
        self, shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]
    ) -> None:
        self.params = [nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for shape in shapes]
        self.optimizer = Optimizer(self.params, **options)
        self.state = [self.optimizer.state[p] for p in self.params]

    def step(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Take a step, and return the updates in float64. Weights are zero again afterwards, and so round nothing."""
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.to(p.dtype)
        self.optimizer.step()
        updates = [p.detach().to(torch.float64, copy=True) for p in self.params]
        with torch.no_grad():
            for p in self.params:
                p.zero_()
        return updates

    def take_from(self, other: Run) -> None:
        """Copy the state of another run."""
        for mine, theirs in zip(self.state, other.state, strict=True):
            for name, x in mine.items():
                x.copy_(theirs[name])

    def orthogonality(self) -> float:
        """Return the largest entry of ``QᵀQ - I`` of any basis."""
        bases = [x.double() for state in self.state for name, x in state.items() if name.startswith("Q_")]
        return max(float((Q.mT @ Q - torch.eye(Q.shape[-1], device=Q.device)).abs().max()) for Q in bases)

    def off_diagonal(self, other: Run) -> float:
        """Return the mean of ``‖offdiag(Qᵀ K Q)‖ / ‖K‖`` with its own bases and the other's covariances."""
        found = []
        for mine, theirs in zip(self.state, other.state, strict=True):
            for side in ("L", "R"):
                K, Q = theirs[side], theirs[f"Q_{side}"]
                K = Q @ K @ Q.mT if MARK in theirs else K  # KL keeps it in the coordinates of its own basis
                found.append(refresh.off_diagonal(K[None], mine[f"Q_{side}"][None]))
        return statistics.fmean(found)


def angle(u: Tensor, v: Tensor) -> float:
    """Return the angle in degrees, without the loss of small ones that a cosine would bring.

    >>> round(angle(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])))
    45
    """
    u, v = u / u.norm(), v / v.norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


@contextmanager
def rounded(phases: Mapping[str, str]) -> Iterator[None]:
    """Round factors of float32 products inside the ``with`` block, in these phases of a step."""
    if not phases:
        yield
        return
    where = _Innermost(lambda: None)
    with listening(where), _Rounding(where, phases):
        yield


class _Innermost(Timeline[None]):
    """Knows which phase is innermost, and keeps no marks."""

    def note(self) -> None:
        """Keep nothing."""

    @property
    def phase(self) -> str:
        """The innermost phase."""
        return self._open[-1]


class _Rounding(TorchDispatchMode):
    """Sees every operation, and rounds the factors of products."""

    def __init__(self, where: _Innermost, phases: Mapping[str, str]) -> None:
        super().__init__()
        self.where, self.phases = where, phases

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = FACTORS.get(func.overloadpacket, ())
        precision = self.phases.get(self.where.phase)
        if precision is not None:
            args = tuple(_round(arg, precision) if i in factors else arg for i, arg in enumerate(args))
        return func(*args, **(kwargs or {}))


def _round(x: Tensor, precision: str) -> Tensor:
    if precision == "tf32":
        return round_to_tf32(x)
    return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for rule in RULES:
        for variant in VARIANTS:
            row = compare(variant, rule, torch.device(args.device))
            print(
                "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else value for name, value in row.items())
            )


if __name__ == "__main__":
    main()
