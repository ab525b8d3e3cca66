"""Step times of ours and of peers on the shapes of two models, by `steepest.lab.bench`.

The first full decomposition of all entrants is replaced by some orthonormal matrix, since real ones would fill the
time. How long later steps take does not depend on it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu.record import Record
from steepest import kernels
from steepest.lab.bench.entrants import Entrant, parse_entrants
from steepest.lab.bench.peers import peers_of
from steepest.lab.bench.results import bench
from steepest.lab.bench.shapes import ShapeSet, shape_set
from steepest.linalg.precision import fp32_matmul_precision

HIGH = "fp32_matmul_prec='high'"
GPT, LLAMA = "gpt2-124m", "llama-1b"
TINY = ShapeSet("tiny", "for tests", Counter({("a", 24, 16): 2, ("b", 16, 16): 1}), 1, 1)
Scope = Callable[[], AbstractContextManager[Any]]
Bases = dict[tuple[int, torch.dtype, torch.device], Tensor]
"""An orthonormal matrix for each side, dtype and device."""
Decomposed = namedtuple("Decomposed", ("eigenvalues", "eigenvectors"))


@dataclass(frozen=True)
class Plan:
    """Entrants that step together."""

    shapes: str
    ours: str
    """A list for `steepest.lab.bench.entrants.parse_entrants`."""
    steps: int
    warmup: int
    expected: float
    """The least seconds that it takes."""
    depth: int | None = None
    peers: bool = True
    varied: str = ""
    """The one of ours that also steps without kernels, with the suggested gates, and in CUDA graphs."""


SOAPS = (
    f"soap-f10, soap-f10({HIGH}), soap-f10({HIGH},stagger=True), soap-f10({HIGH},cuda_graph=True), "
    f"soap-f10({HIGH},solver='cholesky'), kl-soap-f10, kl-soap-f10({HIGH})"
)
PLANS = (
    Plan(GPT, SOAPS, 10, 11, expected=10, varied=f"soap-f10({HIGH})"),
    Plan(GPT, "muon, muon(cuda_graph=True), adamw", 20, 5, expected=3, varied="muon"),
    Plan(GPT, f"soap-f10(max_precond_dim=768), soap-f10({HIGH},max_precond_dim=768)", 10, 11, expected=3, peers=False),
    Plan(LLAMA, f"soap-f10({HIGH})", 10, 11, expected=10, depth=8, peers=False),
    Plan(GPT, f"soap-f1, soap-f1({HIGH}), moso, moso({HIGH})", 3, 1, expected=10),
    Plan(LLAMA, "muon, adamw", 10, 3, expected=5, depth=8),
    Plan(LLAMA, f"soap-f10, soap-f10({HIGH})", 10, 2, expected=15, depth=2),
)
"""In the order of their worth."""
TINY_PLANS = (
    Plan("tiny", f"soap-f2, soap-f2({HIGH})", 2, 2, expected=0, peers=False, varied=f"soap-f2({HIGH})"),
    Plan("tiny", "muon, adamw", 2, 2, expected=0),
)


def run(record: Record) -> None:
    """Benchmark all plans that fit."""
    sets: list[dict[str, Any]] = record.figures.setdefault("sets", [])
    plans = TINY_PLANS if record.tiny else PLANS
    for i, plan in enumerate(plans):
        if record.fits(f"{plan.shapes} {plan.depth or ''}: {plan.ours}", plan.expected):
            end = record.clock() + record.left / max(1.0, (len(plans) - i) / 2)  # the first may take more than others
            everybody, missing = entrants(plan, record.earlier.get("gates", {}).get("suggested"))
            late = lambda end=end: record.clock() > end  # noqa: E731
            found = bench(shapes_of(plan), everybody, record.device, plan.steps, plan.warmup, late=late)
            sets.append(found | {"missing": missing})
            record.figures["step times, ms"] = [row for one in sets for row in times(one)]
            record.write()


def times(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one plan in short."""
    for row in found["rows"]:
        short = {"shapes": f"{found['name']} {found['layers']}/{found['of_layers']}", "contender": row["contender"]}
        if not row["error"]:
            main = row[found["clock"]]
            short |= {"mean": main["mean"], "p50": main["p50"], "max": main["max"], "host": row["cpu_ms"]["mean"]}
            short |= {"/floor": row["over_floor"], "ratio": row["ratio"], "by": row["baseline"]}
            short |= {"steps": len(row["wall_ms_by_step"])}
        yield short | {"error": row["error"]}


def shapes_of(plan: Plan) -> ShapeSet:
    """Return the shapes of a plan, as in ``steepest bench``, or those for tests."""
    return TINY if plan.shapes == "tiny" else shape_set(plan.shapes, plan.depth)


def entrants(plan: Plan, gates: Mapping[str, Any] | None) -> tuple[list[Entrant], list[str]]:
    """Return ours and their variants, and peers, as they come and in TF32; and the packages that are missing."""
    ours = parse_entrants(plan.ours, shapes_of(plan).longest)
    ours = [_family_in_tf32(one) if HIGH in one.label else one for one in ours]
    found, missing = list(ours), []
    ways: dict[str, Scope] = {"without kernels": partial(kernels.use, "never")}
    if gates and os.environ.get("STEEPEST_KERNELS") != "never":
        ways["suggested gates"] = partial(kernels.use, "auto", kernels.Gates(**gates))
    for one in (one for one in ours if one.label == plan.varied):
        found += [replace(one, label=f"{one.label} {way}", scope=scope) for way, scope in ways.items()]
    if plan.peers:
        peers, missing = peers_of([one for one in ours if HIGH not in one.label], libraries=True)
        peers = [one for one in peers if "in float32" not in one.label]  # those spare CPUs bfloat16
        found += peers
        for one in map(_family_in_tf32, peers):
            if one.family in [other.family for other in ours]:
                scope = within(one.scope, partial(fp32_matmul_precision, "high"))
                found.append(replace(one, label=f"{one.label} in TF32", scope=scope))
    bases: Bases = {}
    return [replace(one, scope=within(one.scope, made_up_first(bases))) for one in found], missing


def _family_in_tf32(one: Entrant) -> Entrant:
    """Return an entrant that is compared with others in TF32."""
    return replace(one, family=replace(one.family, kind=f"{one.family.kind} in TF32"))


def within(*scopes: Scope) -> Scope:
    """Return a scope that enters others one within the other."""

    @contextmanager
    def entering() -> Iterator[None]:
        with ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(scope())
            yield

    return entering


def made_up_first(bases: Bases) -> Scope:
    """Return a scope in which eigenvectors are made up when it is entered for construction and for the first step."""
    entered = itertools.count()
    return lambda: made_up_eigenvectors(bases) if next(entered) < 2 else nullcontext()


@contextmanager
def made_up_eigenvectors(bases: Bases) -> Iterator[None]:
    """Let `torch.linalg.eigh` return some orthonormal matrix inside the ``with`` block, for heavyball too."""

    def made_up(A: Tensor, UPLO: str = "L") -> Decomposed:
        key = (A.shape[-1], A.dtype, A.device)
        if key not in bases:
            start = torch.randn(A.shape[-2:], generator=torch.Generator(A.device).manual_seed(0), device=A.device)
            bases[key] = torch.linalg.qr(start).Q.to(A.dtype)
        return Decomposed(A.diagonal(dim1=-2, dim2=-1).sort(dim=-1).values, bases[key].expand(A.shape).clone())

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.linalg, "eigh", made_up))
        if "heavyball" in sys.modules:  # it has a name of its own for it
            stack.enter_context(mock.patch.object(sys.modules["heavyball"].utils, "no_compile_eigh", made_up))
        yield
