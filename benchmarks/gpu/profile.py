"""Where a step's time goes on the device: by kernel, in launches, and idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from gpu.record import Record
from gpu.steps import GPT, HIGH, TINY, made_up_eigenvectors
from steepest.lab.bench.entrants import parse_entrants
from steepest.lab.bench.shapes import shape_set

SHOWN = 12
STEP = "one step of the optimizer"
OPTIMIZERS = (f"soap-f10({HIGH})", "soap-f10", "muon", "adamw")


def run(record: Record) -> None:
    """Profile a steady step of each optimizer, and a step with a refresh of those that have any."""
    shapes = TINY if record.tiny else shape_set(GPT, None if record.cuda else 1)
    spent = 0.0
    for name in OPTIMIZERS[1:3] if record.tiny else OPTIMIZERS:
        if not record.fits(f"profile of {name}", spent):
            continue
        began = record.clock()
        params = [torch.nn.Parameter(torch.zeros(shape, device=record.device)) for shape in shapes.matrices]
        (entrant,) = parse_entrants(name, shapes.longest)
        optimizer = entrant.make(params)
        for p in params:
            p.grad = torch.randn_like(p)
        with made_up_eigenvectors({}):
            optimizer.step()
        period = entrant.family.frequency or 1
        profiled = {period + 1: "steady", 2 * period: "refresh"} if period > 1 else {2: "steady"}
        for number in range(1, max(profiled) + 1):  # steps after the first; everything is refreshed within a period
            if number in profiled:
                _profile(optimizer, record, f"{name}, {profiled[number]}")
            else:
                optimizer.step()
        del optimizer, params, p
        spent = record.clock() - began
        record.write()


def _profile(optimizer: torch.optim.Optimizer, record: Record, name: str) -> None:
    """Take one step under torch's profiler, and record its summary."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * record.cuda
    with profile(activities=activities, acc_events=True) as profiled:
        with record_function(STEP):
            optimizer.step()
        if record.cuda:
            torch.cuda.synchronize(record.device)
    if record.trace:
        file = f"trace {name}.json".replace(" ", "-").replace(",", "").replace("'", "")
        profiled.export_chrome_trace(str(record.out / file))
    step, kernels = summary(profiled.events() or (), DeviceType.CUDA if record.cuda else DeviceType.CPU)
    record.figures.setdefault("steps", []).append({"step": name} | step)
    record.figures.setdefault("kernels", []).extend({"step": name} | kernel for kernel in kernels)


def summary(events: Iterable[Any], on: DeviceType) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a step's times, launches and the share of time in which the device worked, and its most expensive kernels.

    On a CPU operations stand for kernels; those that other operations call count in these.
    """
    events = list(events)
    (step,) = (event for event in events if event.name == STEP and event.device_type == DeviceType.CPU)
    inside = [event for event in events if event.device_type == on and not _is_mark(event)]
    if on == DeviceType.CPU:
        inside = [event for event in inside if event.cpu_parent is not None and _is_mark(event.cpu_parent)]
    busy, begin = 0.0, step.time_range.start
    reached, end = begin, step.time_range.end
    spent: dict[str, list[float]] = defaultdict(list)
    for event in sorted(inside, key=lambda event: event.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        spent[event.name[:120]].append((stop - start) / 1e3)
        busy += max(0.0, stop - max(start, reached))  # overlaps count once
        reached, end = max(reached, stop), max(end, stop)
    found = {"ms": (end - begin) / 1e3, "host_ms": (step.time_range.end - begin) / 1e3, "busy_ms": busy / 1e3}
    found |= {"busy_share": busy / (end - begin), "launches": len(inside)}
    expensive = sorted(spent.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    return found, [{"ms": sum(times), "calls": len(times), "kernel": name} for name, times in expensive]


def _is_mark(event: Any) -> bool:
    """Return whether it is a named span, which the profiler shows on the device too, and no kernel."""
    return bool(event.is_user_annotation or event.name == STEP or event.name.startswith("Optimizer."))
