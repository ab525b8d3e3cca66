"""A section of gpu.py: where a step's time goes on the device: by kernel, in launches, and idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from gpu_job import Job, free, wait
from gpu_steps import HIGH, made_up_eigenvectors, shapes_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

PERIOD = 10
SHOWN = 16
STEP = "one step of the optimizer"
COPIES = ("Memcpy", "Memset")
CREW = (f"soap-f10({HIGH})", "soap-f10", "muon", "adamw")


def measure(job: Job) -> None:
    """A steady step of each, and one with a refresh of those that have any."""
    from steepest.lab.bench.entrants import entrants

    shapes = shapes_of("tiny") if job.tiny else shapes_of("gpt2-124m", None if job.cuda else 1)
    job.figures["shapes"] = str(shapes)
    steps: dict[str, Any] = job.figures.setdefault("steps", {})
    spent = 0.0
    for name in CREW[:1] + CREW[2:3] if job.tiny else CREW:
        if not job.fits(f"profile of {name}", spent):
            continue
        begun = job.clock()
        params = [torch.nn.Parameter(torch.zeros(shape, device=job.device)) for shape in shapes.matrices]
        (entrant,) = entrants(name, max(max(pair) for pair in shapes.matrices))
        optimizer = entrant.make(params)
        for p in params:
            p.grad = torch.randn_like(p)
        with made_up_eigenvectors({}):
            optimizer.step()
        for _ in range(PERIOD if name.startswith("soap") else 2):  # up to the second refresh, and with it
            optimizer.step()
        steps[f"{name}, steady"] = one_step(optimizer, job, f"{name}, steady")
        if name.startswith("soap"):
            for _ in range(PERIOD - 2):
                optimizer.step()
            steps[f"{name}, refresh"] = one_step(optimizer, job, f"{name}, refresh")
        del optimizer, params, p
        free(job.device)
        job.keep()
        spent = job.clock() - begun


def one_step(optimizer: torch.optim.Optimizer, job: Job, name: str) -> dict[str, Any]:
    """One step under torch's profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * job.cuda
    wait(job.device)
    with profile(activities=activities, acc_events=True) as profiled:
        with record_function(STEP):
            optimizer.step()
        wait(job.device)
    if job.trace:
        file = job.out / f"trace {name}.json".replace(" ", "-").replace(",", "").replace("'", "")
        profiled.export_chrome_trace(str(file))
    events = list(profiled.events() or ())
    return summary(events, DeviceType.CUDA if job.cuda else DeviceType.CPU)


def summary(events: Iterable[Any], on: DeviceType) -> dict[str, Any]:
    """Milliseconds by kernel, the dearest first; launches; and the share of the step in which the device worked.

    On a CPU operations stand for kernels, those that other operations call counting in these.
    """
    events = list(events)
    (step,) = (event for event in events if event.name == STEP and event.device_type == DeviceType.CPU)
    inside = [event for event in events if event.device_type == on and not _is_mark(event)]
    if on == DeviceType.CPU:
        inside = [event for event in inside if event.cpu_parent is not None and _is_mark(event.cpu_parent)]
    spans = sorted((event.time_range.start, event.time_range.end) for event in inside)
    spent: dict[str, list[float]] = defaultdict(list)
    for event in inside:
        spent[event.name].append((event.time_range.end - event.time_range.start) / 1e3)
    dearest = sorted(spent.items(), key=lambda item: -sum(item[1]))
    begin, end = step.time_range.start, max([step.time_range.end, *(end for _, end in spans)])
    busy = union(spans)
    return {
        "step_ms": (end - begin) / 1e3,
        "host_ms": (step.time_range.end - begin) / 1e3,
        "busy_ms": busy / 1e3,
        "busy_share": busy / (end - begin),
        "launches": sum(not event.name.startswith(COPIES) for event in inside),
        "copies": sum(event.name.startswith(COPIES) for event in inside),
        "kernels": [{"name": name[:120], "calls": len(times), "ms": sum(times)} for name, times in dearest[:SHOWN]],
    }


def _is_mark(event: Any) -> bool:
    """Whether it is a span that somebody has named, which the profiler shows on the device, too, and no kernel."""
    return bool(event.is_user_annotation or event.name == STEP or event.name.startswith("Optimizer."))


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of intervals, overlaps counted once.

    >>> union([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)])
    4.0
    """
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def table(found: Mapping[str, Any]) -> list[str]:
    """A step's dearest kernels, for people."""
    return [
        f"    {kernel['ms']:8.3f} ms {kernel['calls']:5} × {kernel['name'][:80]}" for kernel in found["kernels"][:8]
    ]
