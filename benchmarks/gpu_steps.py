"""A section of gpu.py: step times of ours and of peers, in turn, on the shapes of two models."""

from __future__ import annotations

import itertools
import os
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from gpu_goals import TF32, goals
from gpu_job import Job, free
from torch import Tensor

from steepest import kernels
from steepest.linalg.precision import fp32_matmul_precision

if TYPE_CHECKING:
    from steepest.lab.bench.entrants import Entrant
    from steepest.lab.bench.measure import Measured
    from steepest.lab.bench.shapes import ShapeSet

HIGH, MEDIUM = "fp32_matmul_prec='high'", "fp32_matmul_prec='medium'"


@dataclass(frozen=True)
class Plan:
    """Who steps together, on what."""

    shapes: str
    ours: str
    """As `steepest.lab.bench.entrants.entrants` reads it."""
    steps: int
    warmup: int
    depth: int | None = None
    peers: bool = True
    expected: float = 0.0
    """Seconds that it takes at least; with less left it isn't begun."""
    variants: bool = False
    """Also without kernels, and with the gates that were suggested."""
    unless: str = ""
    """Left out if this contender, on these shapes, is measured already."""


SOAPS = (
    f"soap-f10, soap-f10({HIGH}), soap-f10({MEDIUM}), soap-f10({HIGH},stagger=True), "
    f"soap-f10({HIGH},refresh='cholesky'), kl-soap-f10, kl-soap-f10({HIGH})"
)
PLANS = (
    Plan("gpt2-124m", SOAPS, 10, 11, expected=10, variants=True),
    Plan("gpt2-124m", "muon, adamw", 20, 3, expected=3, variants=True),
    Plan("gpt2-124m", f"soap-f10(max_precond_dim=768), soap-f10({HIGH},max_precond_dim=768)", 10, 11, peers=False),
    Plan("llama-1b", f"soap-f10({HIGH})", 10, 11, peers=False, expected=15),
    Plan("llama-1b", f"soap-f10({HIGH})", 10, 11, depth=8, peers=False, expected=10, unless=f"soap-f10({HIGH})"),
    Plan("gpt2-124m", f"soap-f1, soap-f1({HIGH}), moso, moso({HIGH})", 3, 1, expected=10),
    Plan("llama-1b", "muon, adamw", 10, 3, depth=8, expected=5),
    Plan("llama-1b", f"soap-f10, soap-f10({HIGH})", 10, 2, depth=2, expected=15),
)
"""In the order of their worth."""
TINY = (
    Plan("tiny", f"soap-f2, soap-f2({HIGH})", 2, 2, peers=False, variants=True),
    Plan("tiny", "muon, adamw", 2, 2),
)


def measure(job: Job) -> None:
    """All plans that fit; then the goals."""
    job.figures["first bases"] = "made up: full decompositions are timed under solvers, and would fill the budget here"
    sets: list[dict[str, Any]] = job.figures.setdefault("sets", [])
    plans = TINY if job.tiny else PLANS
    for i, plan in enumerate(plans):
        what = f"{plan.shapes}{f' at depth {plan.depth}' if plan.depth else ''}: {plan.ours}"
        if any(_has(one, plan) for one in sets) or not job.fits(what, plan.expected):
            continue
        share = job.left / max(1.0, (len(plans) - i) / 2)  # the first may take more than an equal part
        sets.append(run(plan, job, job.clock() + share))
        free(job.device)
        job.figures["goals"] = goals(sets)
        job.keep()


def run(plan: Plan, job: Job, until: float) -> dict[str, Any]:
    """One plan, as JSON has it. Who isn't through by then keeps its whole periods."""
    from steepest.lab.bench.measure import measure as step
    from steepest.lab.bench.speed import measure_speed
    from steepest.lab.bench.text import rows

    shapes = shapes_of(plan.shapes, plan.depth)
    everybody, missing = crew(plan, job, max(max(pair) for pair in shapes.matrices))
    bases = Bases()
    everybody = [replace(one, scope=bounded(one.scope, until, job.clock, bases)) for one in everybody]
    speed = measure_speed(shapes, job.device)
    found = step(everybody, shapes.matrices, job.device, plan.steps, plan.warmup)
    taken = {one.entrant.label: len(one.wall) for one in found}
    found = [whole_periods(one) for one in found]
    made = rows(found, shapes, speed)
    for row in made:
        row["steps"] = taken[row["contender"]]
        row["host_ms"] = row.get("cpu_ms", {}).get("mean")
    return {
        "name": shapes.name,
        "title": str(shapes),
        "layers": shapes.layers,
        "of_layers": shapes.of_layers,
        "steps": plan.steps,
        "warmup": plan.warmup,
        "clock": "wall_ms" if job.cuda else "cpu_ms",
        "missing": missing,
        "speed": asdict(speed),
        "first_bases_seconds": first_bases(shapes, job.earlier.get("solvers", {}).get("rows", [])),
        "rows": made,
    }


def shapes_of(name: str, depth: int | None = None) -> ShapeSet:
    """Those of ``steepest bench``; "tiny" has two small ones, for tests."""
    from steepest.lab.bench.shapes import Shape, ShapeSet, shape_set

    if name == "tiny":
        return ShapeSet("tiny", "for tests", (Shape("a", 24, 16, 2), Shape("b", 16, 16, 1)), 1, 1)
    return shape_set(name, depth)


def first_bases(shapes: ShapeSet, timed: Sequence[Mapping[str, Any]]) -> float | str:
    """What SOAP's first step takes for its decompositions in float64, one by one, from the section on solvers."""
    seconds = {row["d"]: row["ms"] / 1e3 for row in timed if row["precision"] == "float64"}
    sides = [d for pair in shapes.matrices for d in pair]
    unknown = sorted(set(sides) - set(seconds))
    return f"not timed: {unknown}" if unknown else sum(seconds[d] for d in sides)


def crew(plan: Plan, job: Job, longest: int) -> tuple[list[Entrant], list[str]]:
    """Ours and their variants, and peers, as they come and in TF32; and packages that are missing."""
    from steepest.lab.bench.entrants import entrants
    from steepest.lab.bench.peers import peers_of

    ours = entrants(plan.ours, longest)
    everybody = list(ours)
    if plan.variants:
        sizes = job.earlier.get("gates", {}).get("suggested")
        ways: list[tuple[str, Callable[[], AbstractContextManager[Any]]]] = [
            ("without kernels", lambda: kernels.use("never"))
        ]
        if sizes and os.environ.get("STEEPEST_KERNELS") != "never":
            ways.append(("suggested gates", lambda: kernels.use("auto", kernels.Gates(**sizes))))
        chosen = [one for one in ours if one.label in (f"soap-f10({HIGH})", "muon") or job.tiny][:2]
        everybody += [replace(one, label=f"{one.label} {way}", scope=scope) for one in chosen for way, scope in ways]
    if not plan.peers:
        return everybody, []
    peers, missing = peers_of(ours, libraries=True)
    fast = [one for one in peers if "in float32" not in one.label]  # there to spare CPUs bfloat16
    tf32 = [
        replace(one, label=one.label + TF32, scope=both(one.scope, lambda: fp32_matmul_precision("high")))
        for one in fast
        if "AdamW" not in one.label
    ]
    return [*everybody, *fast, *tf32], missing


def whole_periods(one: Measured) -> Measured:
    """Steps beyond the last whole period of refreshes would make the mean too small."""
    period = max(1, one.entrant.family.frequency)
    kept = len(one.wall) // period * period
    error = "" if kept and one.error.startswith(OutOfTime.__name__) else one.error
    return replace(one, cpu=one.cpu[:kept], wall=one.wall[:kept], phases=one.phases[:kept], error=error)


class OutOfTime(Exception):
    """What ends a contender's part when the time for its plan is up."""


def bounded(
    scope: Callable[[], AbstractContextManager[Any]], until: float, clock: Callable[[], float], bases: Bases
) -> Callable[[], AbstractContextManager[None]]:
    """A contender's scope, which is entered to make it and for each step: ends it in time, and makes its bases up."""
    entered = itertools.count()

    @contextmanager
    def entering() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(scope())
            if next(entered) < 2:  # it is made, and takes its first step
                stack.enter_context(made_up_eigenvectors(bases))
            yield
        if clock() > until:  # afterwards, so that this step counts
            raise OutOfTime("the time for this plan is up")

    return entering


def both(*scopes: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[None]]:
    """One scope within the other."""

    @contextmanager
    def entering() -> Iterator[None]:
        with ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(scope())
            yield

    return entering


Bases = dict[tuple[int, torch.dtype, torch.device], Tensor]
"""An orthonormal matrix for each side, dtype and device."""
Decomposed = namedtuple("Decomposed", ("eigenvalues", "eigenvectors"))


@contextmanager
def made_up_eigenvectors(bases: Bases) -> Iterator[None]:
    """Inside the ``with`` block `torch.linalg.eigh` returns some orthonormal matrix, for everybody.

    Optimizers decompose fully at their first step, ours in float64, which takes minutes for a model. How long later
    steps take does not depend on where the bases started.
    """
    places: list[tuple[Any, str]] = [(torch.linalg, "eigh")]
    if "heavyball" in sys.modules:  # which has its own name for it
        places.append((sys.modules["heavyball"].utils, "no_compile_eigh"))

    def made_up(A: Tensor, UPLO: str = "L") -> Decomposed:
        d, key = A.shape[-1], (A.shape[-1], A.dtype, A.device)
        if key not in bases:
            generator = torch.Generator(A.device).manual_seed(0)
            start = torch.randn(d, d, generator=generator, device=A.device)
            bases[key] = torch.linalg.qr(start).Q.to(A.dtype)
        return Decomposed(A.diagonal(dim1=-2, dim2=-1).sort(dim=-1).values, bases[key].expand(A.shape).clone())

    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, made_up)
    try:
        yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


def _has(one: dict[str, Any], plan: Plan) -> bool:
    rows: Sequence[dict[str, Any]] = one["rows"]
    return one["name"] == plan.shapes and any(row["contender"] == plan.unless and not row["error"] for row in rows)
