"""``steepest bench --engine``: the host's time for a step of many small matrices, in one group and in many."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from steepest.lab.bench.entrants import Entrant, Make
from steepest.lab.shared.table import Table

SHAPES = ((8, 8), (8, 16), (16, 8), (16, 16))
"""So small that products take next to no time."""
COUNTS = (100, 300, 1000)
"""Numbers of matrices."""
IN_GROUPS = 300
"""The number of matrices that are stepped in one group, and in as many groups, too."""
WARMUP = 3
BASELINE = "torch AdamW(foreach)"
PEERS: Mapping[str, Make] = {
    BASELINE: lambda params: torch.optim.AdamW(params, foreach=True),
    "torch AdamW(fused)": lambda params: torch.optim.AdamW(params, fused=True),
}
NOTE = (
    "Milliseconds of a step, the median of {steps} interleaved ones, for as many matrices of 8×8 to 16×16 as the head "
    "says: CPU time, and on a GPU the host's time until it has launched everything. ratio: by that of {baseline}; less "
    "is better. groups: each matrix in a parameter group of its own, and the ratio to one group."
)

Row = dict[str, Any]
Name = TypeVar("Name", bound=Hashable)


def measure(entrants: Sequence[Entrant], device: torch.device, steps: int) -> list[Row]:
    """Return, for torch's AdamW and each entrant, the milliseconds of a step by the number of matrices, and in groups.

    The median step of an optimizer that refreshes every three steps or less often is one between refreshes.
    """
    makes = {**PEERS, **{entrant.label: entrant.make for entrant in entrants}}
    rows: dict[str, Row] = {name: {"optimizer": name, "matrices": {}} for name in makes}
    for count in COUNTS:
        for name, found in _times(makes, count, device, steps).items():
            rows[name]["matrices"][count] = found
    in_groups = {(name, True): partial(_in_groups, make) for name, make in makes.items()}
    times = _times({**{(name, False): make for name, make in makes.items()}, **in_groups}, IN_GROUPS, device, steps)
    for name, row in rows.items():
        row["groups"], row["by_one_group"] = times[name, True], times[name, True] / times[name, False]
    return list(rows.values())


def table(rows: Sequence[Row]) -> Table:
    """Return the table of what was measured."""
    (base,) = (row["matrices"] for row in rows if row["optimizer"] == BASELINE)
    head = [""]
    for count in COUNTS:
        head += [f"{count}\nms", "\nratio"]
    lines = []
    for row in rows:
        cells = [row["optimizer"]]
        for count in COUNTS:
            cells += [f"{row['matrices'][count]:.2f}", f"{row['matrices'][count] / base[count]:.2f}"]
        lines.append([*cells, f"{row['groups']:.2f}", f"{row['by_one_group']:.2f}"])
    return Table([*head, f"{IN_GROUPS} groups\nms", "\nratio"], lines)


def _in_groups(make: Make, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return make([{"params": [p]} for p in params])


def _times(makes: Mapping[Name, Make], count: int, device: torch.device, steps: int) -> dict[Name, float]:
    """Return the median milliseconds of a step of each optimizer; they step in turn."""
    generator = torch.Generator().manual_seed(0)
    optimizers = {}
    for name, make in makes.items():
        params = [nn.Parameter(torch.zeros(SHAPES[i % len(SHAPES)], device=device)) for i in range(count)]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizers[name] = make(params)
    seconds: dict[Name, list[float]] = {name: [] for name in makes}
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    for step in range(WARMUP + steps):
        for name, optimizer in optimizers.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = clock()
            optimizer.step()
            if step >= WARMUP:
                seconds[name].append(clock() - start)
    return {name: 1e3 * median(found) for name, found in seconds.items()}
