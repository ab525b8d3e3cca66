"""The machine at hand as a device for ``steepest plan``, measured for the work of one model."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.lab.plan.devices import Curve, Device, interpolated, key
from steepest.lab.plan.models import Model
from steepest.lab.plan.time import FLOAT, entry_bytes, period_of, settled, starting
from steepest.lab.shared.device import one_thread
from steepest.linalg.precision import PRECISIONS, fp32_matmul_precision
from steepest.linalg.solvers import householder
from steepest.rule import Elementwise, Refreshing, Rule
from steepest.rule.work import CHOLESKY, EIGH, QR, SVD, counted, first_work, work
from steepest.rules.parts.moments import adam
from steepest.rules.soap import Soap

NAME = "here"
LONGEST = 1024
"""The longest side on a CPU: speed stays the same beyond, and a product of 8192×8192 takes seconds."""
ROUNDS, ENOUGH = 3, 0.05
"""Products and decompositions are timed at least so often and for so many seconds; the fastest call counts."""
MOST_ENTRIES, COLUMNS = 2**22, 1024
"""The most entries that passes go over (more are in no cache anyway), and the columns in which they lie."""
EVICTED, COLD_ROUNDS = 2**25, 7
"""The entries that are written to evict everything else from the caches; how often each pass is timed."""
TINY, CROWD = 8, 9
"""The side of matrices that take no time but their stack's own, and how many are in the larger stack."""
LONGEST_PERIOD = 20
"""In steps. A refresh that comes less often has little part in what a stack costs whatever its size."""

Clock = Callable[[], float]


def here(model: Model, device: torch.device | None = None) -> Device:
    """Measure the first GPU, or else the CPU on one thread by its CPU time. It takes some seconds.

    Speeds are the best of some calls, since whatever else the machine does can only lengthen one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rule = settled(model.rule, device.type)
    clock = clock_of(device)
    with one_thread():
        wanted = _wanted(model, rule, starting(model.rule, device.type))
        speeds = {name: curve(name, sizes, device, clock) for name, sizes in wanted.items()}
        alone, other = _overhead(rule, device, clock) if isinstance(rule, Rule) else (0.0, 0.0)
        bandwidth, entrywise, passes = _bandwidths(model, device, clock)
        trained, size = ("highest", 512) if device.type == "cpu" else ("bfloat16", 4096)
        training = interpolated(curve(trained, [size], device, clock), size)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name=NAME,
        kind=device.type,
        speeds=speeds,
        bandwidth=bandwidth,
        entrywise=entrywise,
        passes=passes,
        per_stack=alone,
        per_matrix=other,
        training=training,
        memory=float(memory),
    )


def _wanted(model: Model, rule: object, starts: object) -> dict[str, set[int]]:
    """Return the sizes of products at each precision, and of each decomposition, in the model's steps."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    if isinstance(rule, Rule) and isinstance(starts, Rule):
        for m, n in {piece[1:] for weight in model.weights if weight.view for piece in weight.view.pieces}:
            for part in (*work(rule, m, n).parts, *first_work(starts, m, n).parts):
                wanted[key(part)].add(part.size)
    return wanted


def curve(name: str, sizes: Iterable[int], device: torch.device, clock: Clock) -> Curve:
    """Measure FLOPs per second at these sizes, of products at a precision or of a decomposition, by its `key`."""
    limit = LONGEST if device.type == "cpu" else max(sizes)
    points = {}
    for size in sorted({min(max(size, 2), limit) for size in sizes}):
        A = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device)
        K = A @ A.mT / size + torch.eye(size, device=device)  # positive definite
        K, task = (K.bfloat16() if name == "bfloat16" else K), TASKS.get(name, lambda K: K @ K)
        with fp32_matmul_precision(name if name in PRECISIONS else "highest"):
            points[size] = counted(task, K.to("meta")).total / fastest(partial(task, K), clock)
    return tuple(points.items())


def _cholesky(K: Tensor) -> object:
    """Decompose a matrix, and solve a triangular system with as many right-hand sides as it has rows."""
    R, _ = torch.linalg.cholesky_ex(K, upper=True)
    return torch.linalg.solve_triangular(R, K, upper=True, left=False)


TASKS: Mapping[str, Callable[[Tensor], object]] = {
    QR: householder,
    CHOLESKY: _cholesky,
    EIGH: torch.linalg.eigh,
    SVD: torch.linalg.svd,
}
"""The decomposition of a positive definite matrix that is timed for each kind."""


def _bandwidths(model: Model, device: torch.device, clock: Clock) -> tuple[float, float, float]:
    """Measure bytes per second of a copy, of elementwise steps, and of a stack's step outside products.

    The last is gathering, a norm, Adam's pass with both floors, and moving the weights, each byte counted once.
    """
    rows = max(min(model.parameters, MOST_ENTRIES) // COLUMNS, 1)
    G = torch.randn(1, rows, COLUMNS, device=device)
    gathered, W = torch.empty_like(G), torch.zeros_like(G)
    state = {"exp_avg": torch.zeros_like(G), "exp_avg_sq": torch.zeros_like(G)}
    t = torch.ones(1, 1, 1, device=device)

    p = torch.nn.Parameter(W.clone())
    p.grad = G
    optimizer = _optimizer([p], model.elementwise)

    def step() -> None:
        gathered.copy_(G)
        torch.linalg.vector_norm(gathered, dim=(-2, -1))
        D = adam(gathered, state, t, (0.9, 0.95), 1e-8, momentum_floor=True, noise_floor=Soap().noise_floor)
        W.mul_(0.99).add_(D, alpha=-1e-3)

    calls: tuple[tuple[float, Callable[[], object]], ...] = (
        (2 * FLOAT, lambda: gathered.copy_(G)),
        (2 * entry_bytes(model.elementwise) + 3 * FLOAT, optimizer.step),
        (2 * 2 * FLOAT + 6 * FLOAT, step),
    )
    scratch = torch.zeros(EVICTED, device=device)
    copy, entrywise, passes = (per_entry * G.numel() / _cold(call, scratch, clock) for per_entry, call in calls)
    return copy, entrywise, passes


def _cold(call: Callable[[], object], scratch: Tensor, clock: Clock) -> float:
    """Return the median seconds of several calls with cold caches, since training goes on between steps."""
    times = []
    for _ in range(COLD_ROUNDS):
        scratch.add_(1)
        start = clock()
        call()
        times.append(clock() - start)
    return median(times)


def _overhead(rule: Rule, device: torch.device, clock: Clock) -> tuple[float, float]:
    """Measure the seconds of a step of one tiny matrix, and of each other in its stack; refreshes on the average."""
    period = min(period_of(rule), LONGEST_PERIOD)
    if isinstance(rule, Refreshing):
        rule = replace(rule, precondition_frequency=period)
    found = []
    for count in (1, CROWD):
        params = [torch.nn.Parameter(torch.zeros(TINY, TINY, device=device)) for _ in range(count)]
        optimizer = _optimizer(params, rule)
        for p in params:
            p.grad = torch.randn(TINY, TINY, device=device)
        times = []
        for _ in range(1 + 5):
            start = clock()
            for _ in range(period):
                optimizer.step()
            times.append((clock() - start) / period)
        found.append(median(times[1:]))
    return found[0], max(found[1] - found[0], 0.0) / (CROWD - 1)


def _optimizer(params: list[torch.nn.Parameter], rule: Rule | Elementwise) -> Optimizer:
    """Return an optimizer with the rule's options."""
    return Optimizer(params, rule.name, lr=1e-3, **{name: getattr(rule, name) for name in rule.defaults()})


def clock_of(device: torch.device) -> Clock:
    """Return a clock in seconds: CPU time of this thread on a CPU, else wall time once the device has done its work."""
    if device.type == "cpu":
        return time.thread_time

    def elapsed() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return elapsed


def fastest(work: Callable[[], object], clock: Clock) -> float:
    """Return the seconds of the fastest of several calls."""
    rounds, spent, best = 0, 0.0, math.inf
    while rounds < ROUNDS or spent < ENOUGH:
        start = clock()
        work()
        took = clock() - start
        rounds, spent, best = rounds + 1, spent + took, min(best, took or math.inf)
    return best
