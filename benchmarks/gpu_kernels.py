"""Sections of gpu.py: are the kernels right, and from which sizes on do they pay?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from gpu_job import Job, Unavailable
from torch import Tensor

from steepest import kernels
from steepest.kernels import use
from steepest.lab.bench.gates import Figure, in_turn, measure_blocks, measure_gates, suggest
from steepest.linalg.precision import fp32_matmul_precision, has_tf32
from steepest.linalg.symmetric import accumulate_gram, gram, symmetric_product
from steepest.rules.parts.moments import adam
from steepest.stack.undo import undoing

ROUNDING = {"float32": 2.0**-23, "tf32": 2.0**-11, "bfloat16": 2.0**-8}
WORSE = 3.0
"""A kernel's distance from float64 may be so many times its twin's, and a rounding."""
PRODUCTS = (
    # batch, rows, columns, transposed
    (12, 3072, 768, False),
    (12, 768, 3072, True),
    (3, 1000, 333, False),
    (1, 2048, 8192, False),
    (2, 1537, 77, True),
    (1, 8192, 2048, True),
    (4, 65, 1, False),
)
MOMENTS = ((12, 3072, 768), (1, 2048, 8192), (3, 1001, 333), (2, 17, 1))


def check(job: Job) -> None:
    """Each kernel at the sizes of models, odd ones, and transposes: against float64, its twin, itself, and alone."""
    runs = _run_here(job.device)
    job.figures["kernels_run"] = runs
    small = lambda shape: tuple(min(n, 40) for n in shape)  # noqa: E731
    for precision in ROUNDING:
        for batch, d, k, transposed in PRODUCTS:
            if job.tiny:
                batch, d, k = small((batch, d, k))
            name = f"gram of {batch} × {d} × {k}{' transposed' if transposed else ''}, {precision}"
            case = (job, name, precision, batch, d, k, transposed, runs)
            job.checked(name, lambda case=case: _gram(*case))  # type: ignore[misc]
    for precision in ROUNDING:
        d = 33 if job.tiny else 2048
        name = f"polynomial of 2 × {d}, {precision}"
        job.checked(name, lambda case=(job, name, precision, d, runs): _polynomial(*case))  # type: ignore[misc]
    for shape in MOMENTS:
        shape = small(shape) if job.tiny else shape
        name = f"undoing {' × '.join(map(str, shape))}"
        job.checked(name, lambda case=(job, name, shape, runs): _undoing(*case))  # type: ignore[misc]
        for nesterov in (False, True):
            name = f"adam of {' × '.join(map(str, shape))}{', nesterov' if nesterov else ''}"
            job.checked(name, lambda case=(job, name, shape, nesterov, runs): _adam(*case))  # type: ignore[misc]


def gates(job: Job) -> None:
    """Kernels against their twins by size, and the gates that follow; on a CPU, its blocks against whole products."""
    if not job.cuda and not _run_here(job.device):
        ratios = measure_blocks(((1, 24, 48),) if job.tiny else ((1, 768, 768),), repeats=3)
        job.figures["blocks"] = {" × ".join(map(str, shape)): ratio for shape, ratio in ratios.items()}
        job.left_out.append("kernels: they need CUDA")
        return
    if not _run_here(job.device):
        raise Unavailable("kernels don't run on this device: is Triton installed, and STEEPEST_KERNELS not 'never'?")
    job.figures["undoing"] = _time_of_undoing(job, (2, 40, 40) if job.tiny else (12, 3072, 768))
    found: list[Figure] = []
    spent: dict[int, float] = {}
    for size in (64,) if job.tiny else (512, 1024, 2048, 4096, 8192):
        for batch in (1, 4):
            expected = (3.0 if size > 4096 else 1.3) * spent.get(batch, 0.0)  # compiling takes most of the time
            if not job.fits(f"gates at {batch} of {size}", expected):
                continue
            start = job.clock()
            found += measure_gates(job.device, adam, sizes=(size,), batches=(batch,), repeats=5)
            spent[batch] = job.clock() - start
            job.figures["figures"] = [asdict(figure) | {"ratio": figure.ratio} for figure in found]
            job.figures["suggested"] = asdict(suggest(found))
            job.keep()


def _run_here(device: torch.device) -> bool:
    with use("always"):
        return kernels.available(torch.zeros(1, device=device))


def _gram(job: Job, name: str, precision: str, batch: int, d: int, k: int, transposed: bool, runs: bool) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    X = _normal(job, batch, k, d).mT.to(dtype) if transposed else _normal(job, batch, d, k).to(dtype)
    K = (X.float() @ X.float().mT / k).to(dtype)
    K = K.tril() + K.tril(-1).mT  # symmetric to the last bit, as covariances are
    decay = torch.linspace(0.5, 0.99, batch, device=job.device).view(-1, 1, 1)
    beta: float | Tensor = 0.9 if dtype == torch.bfloat16 else decay
    exact = beta * K.double() + (1 - beta) * X.double() @ X.double().mT

    def work(which: slice = slice(None)) -> Tensor:
        out = K[which].clone()
        accumulate_gram(out, X[which], beta[which] if isinstance(beta, Tensor) else beta)
        return out

    _compare(job, name, precision, work, exact, runs)


def _polynomial(job: Job, name: str, precision: str, d: int, runs: bool) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with use("never"):
        A = gram(_normal(job, 2, d, d) / d**0.5)
    A = (A.tril() + A.tril(-1).mT).to(dtype)
    exact = -2 * A.double() + 0.5 * A.double() @ A.double()

    def work(which: slice = slice(None)) -> Tensor:
        B = A[which]
        return symmetric_product(B, B, B, beta=-2.0, alpha=0.5)

    _compare(job, name, precision, work, exact, runs)


def _adam(job: Job, name: str, shape: tuple[int, ...], nesterov: bool, runs: bool) -> None:
    g, m, v = (_normal(job, *shape, seed=seed) for seed in range(3))
    v = v.square()
    t = torch.arange(3.0, 3.0 + shape[0], device=job.device).view(-1, 1, 1)
    options: dict[str, Any] = {"nesterov": nesterov, "momentum_floor": True, "noise_floor": 1e-2}

    def work(which: slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        state = {"exp_avg": m[which].to(dtype, copy=True), "exp_avg_sq": v[which].to(dtype, copy=True)}
        D = adam(g[which].to(dtype), state, t[which].to(dtype), (0.9, 0.95), 1e-8, **options)
        return torch.cat([D, state["exp_avg"], state["exp_avg_sq"]], dim=-1)

    _compare(job, name, "float32", work, work(dtype=torch.float64), runs, symmetric=False)


def _undoing(job: Job, name: str, shape: tuple[int, ...], runs: bool) -> None:
    x, finite = _normal(job, *shape), torch.arange(shape[0], device=job.device) % 2 == 0
    expected = torch.where(finite.view(-1, 1, 1), x + 1, x)
    if not runs:
        return job.check(name, None, 0.0, "needs CUDA and Triton")
    with use("always"), launches() as launched:
        _undone(x, finite)
    job.check(f"{name}: as it should be", float(not torch.equal(x, expected)), 0.0)
    job.check(f"{name}: launched", float(launched == []), 0.0)


def _undone(x: Tensor, finite: Tensor) -> None:
    undo = undoing(finite, [x])
    x.add_(1)
    undo()


def _time_of_undoing(job: Job, shape: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of a pass over a tensor that nothing is undone of, by the kernel and by torch."""
    x, finite = _normal(job, *shape), torch.ones(shape[0], dtype=torch.bool, device=job.device)
    kernel, twin = in_turn(lambda: _undone(x, finite), job.device, repeats=5)
    return {"kernel_ms": kernel, "twin_ms": twin}


def _compare(
    job: Job,
    name: str,
    precision: str,
    work: Callable[..., Tensor],
    exact: Tensor,
    runs: bool,
    symmetric: bool = True,
) -> None:
    """The twin with float64; then the kernel with both, with itself, and one matrix with that of the batch."""
    if precision == "tf32" and job.cuda and not has_tf32(job.device):
        raise Unavailable("needs TF32")
    with fp32_matmul_precision("high" if precision == "tf32" else "highest"):
        with use("never"):
            twin = _distance(work(), exact)
        allowed = 16 * ROUNDING[precision]  # sums of many terms, and their order
        job.check(f"{name}: twin and float64", twin, allowed)
        if not runs:
            return job.check(name, None, 0.0, "needs CUDA and Triton")
        with use("always"), launches() as launched:
            result = work()
            again = [work() for _ in range(4)]
            alone = work(slice(-1, None))
    limit = WORSE * twin + ROUNDING[precision]
    job.check(f"{name}: kernel and float64", _distance(result, exact), limit, f"twin {twin:.1e}")
    job.check(f"{name}: launched", float(launched == []), 0.0)
    job.check(f"{name}: repeated", float(sum(not torch.equal(result, one) for one in again)), 0.0)
    job.check(f"{name}: alone as in a batch", float(not torch.equal(alone, result[-1:])), 0.0)
    if symmetric:
        job.check(f"{name}: symmetric", float(not torch.equal(result, result.mT)), 0.0)


@contextmanager
def launches() -> Iterator[list[str]]:
    """Which kernels are called inside the ``with`` block: a check of a kernel should not be one of its twin."""
    from steepest.kernels import adam as moments
    from steepest.kernels import keeping, symmetric

    called: list[str] = []
    places = ((symmetric, "_launch"), (moments, "adam"), (keeping, "put_back"))
    before = [getattr(module, name) for module, name in places]

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    for (module, name), function in zip(places, before, strict=True):
        setattr(module, name, counted(function, name))
    try:
        yield called
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


def _normal(job: Job, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(job.device).manual_seed(seed), device=job.device)


def _distance(x: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((x.double() - exact).norm() / exact.norm())
