"""The machine at hand as a device for ``steepest plan``: measured, for the work of one model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.lab.bench.speed import FLOAT, LONGEST, clock_of, fastest
from steepest.lab.plan.devices import Curve, Device, interpolated, key
from steepest.lab.plan.models import Model
from steepest.lab.plan.time import entry_bytes, period_of, settled
from steepest.linalg.precision import PRECISIONS, fp32_matmul_precision
from steepest.linalg.solvers import householder
from steepest.rule import Elementwise, Refreshing, Rule
from steepest.rule.work import CHOLESKY, EIGH, QR, SVD, counted, work
from steepest.rules.parts.moments import adam
from steepest.rules.soap import Soap

NAME = "here"
MOST_ENTRIES = 2**22
"""Of what is passed over: more, and it is in no cache anyway."""
COLUMNS = 1024
EVICTED, COLD_ROUNDS = 2**25, 7
"""Entries that are written to fill the caches with something else; how often each pass is timed."""
TINY, CROWD = 8, 9
"""Sides of matrices that take no time but their stack's own; how many are in the larger stack."""
LONGEST_PERIOD = 20
"""In steps: a refresh that comes less often has little part in what a stack costs whatever its size."""


def here(model: Model, device: torch.device | None = None) -> Device:
    """Measure the first GPU, or the CPU on one thread, by its CPU time: about two seconds.

    Speeds are the best of some calls, since what else the machine does can only lengthen one. On a CPU sides are cut to
    1024, since speed is the same beyond.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rule = settled(model.rule, device.type)
    clock = clock_of(device)
    with _one_thread(device):
        speeds = {name: _curve(name, sizes, device, clock) for name, sizes in _wanted(model, rule).items()}
        alone, other = _overhead(rule, device, clock) if isinstance(rule, Rule) else (0.0, 0.0)
        bandwidth, entrywise, passes = _bandwidths(model, device, clock)
        return Device(
            name=NAME,
            kind=device.type,
            speeds=speeds,
            bandwidth=bandwidth,
            entrywise=entrywise,
            passes=passes,
            per_stack=alone,
            per_matrix=other,
            training=_training(device, clock),
            memory=_memory(device),
        )


def _wanted(model: Model, rule: object) -> dict[str, set[int]]:
    """The sizes of products at each precision, and of each decomposition, that the model's step has."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    if isinstance(rule, Rule):
        shapes = {(m, n) for weight in model.weights if weight.view for _, m, n in weight.view.pieces}
        for m, n in shapes:
            for part in work(rule, m, n).parts:
                wanted[key(part)].add(part.size)
    return wanted


def _curve(name: str, sizes: Iterable[int], device: torch.device, clock: Callable[[], float]) -> Curve:
    """FLOPs per second at these sizes."""
    limit = LONGEST if device.type == "cpu" else max(sizes)
    points = {}
    for size in sorted({min(max(size, 2), limit) for size in sizes}):
        task, K = TASKS.get(name, _square), _positive_definite(size, device)
        K = K.bfloat16() if name == "bfloat16" else K
        with fp32_matmul_precision(name if name in PRECISIONS else "highest"):
            points[size] = counted(task, K.to("meta")).total / fastest(partial(task, K), clock)
    return tuple(points.items())


def _square(K: Tensor) -> object:
    return K @ K


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


def _positive_definite(d: int, device: torch.device) -> Tensor:
    """A random symmetric positive definite matrix ``[d, d]``."""
    A = torch.randn(d, d, generator=torch.Generator(device).manual_seed(0), device=device)
    K: Tensor = A @ A.mT / d + torch.eye(d, device=device)
    return K


def _bandwidths(model: Model, device: torch.device, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Bytes per second of a copy, of elementwise steps, and of what a stack's step does outside products.

    That is gathering, a norm, Adam's pass with both floors, and moving the weights, each byte counted once.
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

    calls: tuple[tuple[int, Callable[[], object]], ...] = (
        (2 * FLOAT, lambda: gathered.copy_(G)),
        (2 * entry_bytes(model.elementwise) + 3 * FLOAT, optimizer.step),
        (2 * 2 * FLOAT + 6 * FLOAT, step),
    )
    scratch = torch.zeros(EVICTED, device=device)
    copy, entrywise, passes = (once * G.numel() / _cold(call, scratch, clock) for once, call in calls)
    return copy, entrywise, passes


def _cold(call: Callable[[], object], scratch: Tensor, clock: Callable[[], float]) -> float:
    """Seconds, the median of some calls before which the caches forgot everything: training goes on between steps."""
    times = []
    for _ in range(COLD_ROUNDS):
        scratch.add_(1)
        start = clock()
        call()
        times.append(clock() - start)
    return median(times)


def _overhead(rule: Rule, device: torch.device, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step of one tiny matrix, and more for each other in its stack; refreshes on the average."""
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
    """With the rule's options."""
    return Optimizer(params, rule.name, lr=1e-3, **{name: getattr(rule, name) for name in rule.defaults()})


def _training(device: torch.device, clock: Callable[[], float]) -> float:
    """FLOPs per second of large products, in bfloat16 on a GPU and in float32 on a CPU."""
    name, size = ("highest", 512) if device.type == "cpu" else ("bfloat16", 4096)
    return interpolated(_curve(name, [size], device, clock), size)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: what a thread can do is what others repeat."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
