"""A section of gpu.py: what of an optimizer only a GPU can show, and whether kernels change how it trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gpu_job import Job, Unavailable, milliseconds
from torch import Tensor, nn

from steepest import kernels
from steepest.engine.optimizer import Optimizer

CREW: Mapping[str, dict[str, Any]] = {
    "soap": {"rule": "soap", "lr": 3e-3, "precondition_frequency": 4},
    "kl": {"rule": "soap", "lr": 3e-3, "precondition_frequency": 4, "use_kl_shampoo": True},
    "one-sided": {"rule": "soap", "lr": 3e-3, "precondition_frequency": 4, "max_precond_dim": 256},
    "staggered": {"rule": "soap", "lr": 3e-3, "precondition_frequency": 4, "stagger": True},
    "moso": {"rule": "moso", "lr": 1e-3},
    "muon": {"rule": "muon", "lr": 2e-2},
    "adamw": {"rule": "adamw", "lr": 1e-3},
}
PERIOD = 4
SHAPES = ((512, 256), (512, 256), (256, 256), (300, 257))
CLOSE = 0.05
"""How far two trainings may drift apart, as a share of what the loss fell; and of an update, GPU's from CPU's."""


def check(job: Job) -> None:
    """Everybody in turn; a check that raises is noted, and the rest goes on."""
    for name, options in CREW.items():
        checks = {
            "a NaN leaves no trace": _no_trace,
            "resumes bit by bit": _resumes,
            "waits for the device": _waits,
            "steps as on the CPU": _as_on_the_cpu,
        }
        for what, work in checks.items():
            label = f"{name}: {what}"
            case = (job, label, options)
            job.checked(label, lambda work=work, case=case: work(*case))  # type: ignore[misc]
        job.keep()
    for name, options in CREW.items():
        if options["rule"] != "adamw":
            label = f"{name}: replays to the same bits"
            job.checked(label, lambda label=label, options=options: _replays(job, label, options))  # type: ignore[misc]
    job.keep()
    for name in ("soap", "kl", "muon", "moso"):
        label = f"{name}: trains as without kernels"
        job.checked(label, lambda label=label, name=name: _trains(job, label, CREW[name]))  # type: ignore[misc]


class Training:
    """Matrices on a device, their optimizer, and gradients that are the same for all with the same seed."""

    def __init__(self, job: Job, options: Mapping[str, Any], device: torch.device | None = None) -> None:
        self.device = device or job.device
        shapes = [tuple(max(3, n // 32) for n in shape) for shape in SHAPES] if job.tiny else SHAPES
        self.params = [nn.Parameter(self._normal(shape, -1 - i)) for i, shape in enumerate(shapes)]
        self.optimizer = Optimizer(self.params, **options)

    def step(self, number: int, spoilt: Sequence[int] = ()) -> None:
        """One step; the gradients of those ``spoilt`` have a NaN in them."""
        for i, p in enumerate(self.params):
            p.grad = self._normal(p.shape, 1000 * number + i)
            if i in spoilt:
                p.grad[0, 0] = torch.nan
        self.optimizer.step()

    def seen(self, i: int) -> dict[str, Tensor]:
        """A matrix and its state."""
        p = self.params[i]
        state = {name: x.clone() for name, x in self.optimizer.state[p].items()}
        return {"weight": p.detach().clone(), **state}

    def _normal(self, shape: Sequence[int], seed: int) -> Tensor:
        """Drawn on the CPU, so that both devices get the same."""
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed % 2**31)).to(self.device)


def _no_trace(job: Job, label: str, options: Mapping[str, Any]) -> None:
    """A NaN while a basis refreshes: nothing of that matrix has changed, and everything of the others has."""
    training = Training(job, options)
    for k in range(PERIOD):
        training.step(k)
    before = [training.seen(i) for i in range(len(training.params))]
    training.step(PERIOD, spoilt=[1])  # the step of a refresh
    skipped = training.optimizer.skipped  # asks, so that the host's clocks are settled
    after = [training.seen(i) for i in range(len(training.params))]
    changed = sum(not torch.equal(x, before[1][name]) for name, x in after[1].items())
    stayed = sum(torch.equal(after[i]["weight"], before[i]["weight"]) for i in (0, 2, 3))
    bad = sum(not bool(x.isfinite().all()) for seen in after for x in seen.values())
    note = f"changed {changed}, others that stayed {stayed}, not finite {bad}, skipped {skipped}"
    job.check(label, float(changed + stayed + bad + abs(skipped - 1)), 0.0, note)


def _resumes(job: Job, label: str, options: Mapping[str, Any]) -> None:
    """A copy that loads the state goes on to the same bits."""
    first = Training(job, options)
    for k in range(PERIOD + 1):
        first.step(k)
    saved = copy.deepcopy(first.optimizer.state_dict())
    second = Training(job, options)
    with torch.no_grad():
        for p, q in zip(second.params, first.params, strict=True):
            p.copy_(q)
    second.optimizer.load_state_dict(saved)
    for training in (first, second):
        for k in range(PERIOD + 1, 3 * PERIOD):
            training.step(k)
    unlike = sum(not torch.equal(p, q) for p, q in zip(first.params, second.params, strict=True))
    job.check(label, float(unlike), 0.0, "matrices that differ")


def _waits(job: Job, label: str, options: Mapping[str, Any]) -> None:
    """How often a step makes the host wait: never without a refresh; with one, it is counted."""
    if not job.cuda:
        raise Unavailable("needs CUDA")
    training = Training(job, options)
    counts: dict[str, int] = {}
    for k in range(3 * PERIOD):
        if k < PERIOD + 1:  # allocates, compiles, and has everything refreshed once
            training.step(k)
            continue
        refreshes = options["rule"] == "moso" or "stagger" in options or k % PERIOD == 0
        kind = "with a refresh" if refreshes else "without"
        if kind == "without" and counts.get(kind) == 0:
            with sync_debug_mode("error"):  # raises in place of a warning
                training.optimizer.step()
            continue
        counts[kind] = max(counts.get(kind, 0), _synchronizations(training))
    job.figures.setdefault("waits", {})[label.partition(":")[0]] = counts
    job.check(label, float(counts.get("without", 0)), 0.0, ", ".join(f"{kind}: {n}" for kind, n in counts.items()))


def _synchronizations(training: Training) -> int:
    """In one more step, on the gradients at hand."""
    with warnings.catch_warnings(record=True) as heard, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        training.optimizer.step()
    return sum("called a synchronizing" in str(one.message) for one in heard)


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """torch's watch over operations that wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _as_on_the_cpu(job: Job, label: str, options: Mapping[str, Any]) -> None:
    """The same steps on both devices, with the same solver."""
    options = dict(options)
    if options["rule"] == "soap":
        options["refresh"] = "first_order"
    here, there = Training(job, options), Training(job, options, torch.device("cpu"))
    start = [p.detach().clone() for p in there.params]
    for k in range(PERIOD + 2):
        here.step(k)
        there.step(k)
    worst = 0.0
    for p, q, W in zip(here.params, there.params, start, strict=True):
        moved = q.detach() - W
        worst = max(worst, float((p.detach().cpu() - q.detach()).norm() / moved.norm()))
    limit = 0.3 if options["rule"] == "muon" else CLOSE  # bfloat16 here, float32 there
    job.check(label, worst, limit, "of the way gone, after six steps")


def _replays(job: Job, label: str, options: Mapping[str, Any]) -> None:
    """With updates recorded and replayed as without; and what a step without a refresh takes, either way."""
    pair = [Training(job, {**options, "cuda_graph": graph}) for graph in (False, True)]
    for k in range(30):
        for training in pair:
            training.step(k, spoilt=[1] if k in (9, 18) else [])
    plain, replayed = ([training.seen(i) for i in range(len(training.params))] for training in pair)
    unlike = sum(not torch.equal(x, there[name]) for here, there in zip(plain, replayed, strict=True)
                 for name, x in here.items())  # fmt: skip
    if job.cuda and options["rule"] != "moso":  # which decomposes in each step
        unlike += sum(stack.recorder.recording is None for stack in pair[1].optimizer._stacks)
    took = {}
    for way, graph in (("eager_ms", False), ("replayed_ms", True)):
        seldom = {"precondition_frequency": 10**6} if options["rule"] == "soap" else {}
        training = Training(job, {**options, **seldom, "cuda_graph": graph})
        for k in range(PERIOD):
            training.step(k)
        took[way] = milliseconds(training.optimizer.step, job.device)
    job.figures.setdefault("replays", {})[label.partition(":")[0]] = took
    times = f"{took['eager_ms']:.3f} ms a step, {took['replayed_ms']:.3f} replayed"
    job.check(label, float(unlike), 0.0, f"tensors that differ, stacks not recorded; {times}")


def _trains(job: Job, label: str, options: Mapping[str, Any]) -> None:
    """A regression, with kernels wherever they can run and without any."""
    with kernels.use("always"):
        if not kernels.available(torch.zeros(1, device=job.device)):
            raise Unavailable("needs CUDA and Triton")
    losses = {mode: _losses(job, options, mode) for mode in ("always", "never")}
    fall = losses["never"][0] - losses["never"][-1]
    gap = max(abs(a - b) for a, b in zip(losses["always"], losses["never"], strict=True))
    job.figures.setdefault("training", {})[label.partition(":")[0]] = losses
    job.check(label, gap / fall if fall > 0 else float("nan"), CLOSE, "largest gap, as a share of what the loss fell")


def _losses(job: Job, options: Mapping[str, Any], mode: str, steps: int = 16) -> list[float]:
    width = 24 if job.tiny else 640
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(job.device)

    x = normal(4 * width, width)
    y = torch.tanh(x @ normal(width, width) / width**0.5)
    params = [nn.Parameter(normal(*shape) / width**0.5) for shape in ((2 * width, width), (width, 2 * width))]
    optimizer = Optimizer(params, **options)
    losses = []
    with kernels.use(mode):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(torch.tanh(x @ params[0].T) @ params[1].T, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return [float(loss) for loss in losses]
