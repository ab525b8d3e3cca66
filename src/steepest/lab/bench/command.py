"""The command ``steepest bench``: measure, show, and write down."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from steepest.lab.bench.entrants import DEFAULT, Entrant, entrants
from steepest.lab.bench.measure import measure
from steepest.lab.bench.peers import PACKAGES, peers_of
from steepest.lab.bench.report import CLOCKS, page
from steepest.lab.bench.shapes import ShapeSet, shape_set
from steepest.lab.bench.speed import measure_speed
from steepest.lab.bench.text import (
    FOOTNOTE,
    PHASES_NOTE,
    Table,
    comparisons,
    failures,
    missing_note,
    phases,
    rows,
    times,
)
from steepest.lab.shared.device import one_thread
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions

DEVICES = ("cpu", "cuda")
NAME = 12
"""Characters that a contender's name has at least before it is folded."""


@dataclass(frozen=True)
class Request:
    """What the command line was asked for."""

    shapes: str = "gpt-tiny"
    """Names in `steepest.lab.bench.shapes.MODELS`, separated by commas."""
    optimizers: str | None = None
    peers: bool = False
    compiled: bool = False
    steps: int = 40
    warmup: int | None = None
    """None: one more than the longest period, so that everything has been refreshed once."""
    depth: int | None = None
    device: str = "cpu"
    out: Path = Path("runs/bench")
    command: str = ""


def run(request: Request, console: Console) -> None:
    """All of it.

    Raises:
        BadInput: for anything that can't be done; nothing has been measured then.
    """
    device = pick_device(request.device)
    if request.compiled and not request.peers:
        raise BadInput("--compiled: is about peers that compile themselves, so it needs --peers")
    plans = [(shapes, *_crew(request, shapes)) for shapes in _sets(request)]
    warmups = [_warmup(request, crew) for _, crew, _ in plans]
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {request.out}: {error.strerror}") from error
    missing = sorted({package for *_, packages in plans for package in packages})
    console.print(
        f"[bold]steepest bench[/]: {request.steps} steps, one thread, {escape(_name(device))}", highlight=False
    )
    for package in missing:
        console.print(escape(missing_note(package)), style="yellow", highlight=False)
    clock = "wall_ms" if device.type == "cuda" else "cpu_ms"
    sets = []
    with one_thread():
        for (shapes, crew, _), warmup in zip(plans, warmups, strict=True):
            sets.append(_bench(shapes, crew, device, request.steps, warmup, console))
            _show(sets[-1], clock, console)
    content = {
        "command": request.command,
        "versions": versions() | _peer_versions(),
        "machine": machine(),
        "device": _name(device),
        "threads": 1,
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "steps": request.steps,
        "clock": clock,
        "missing": missing,
        "sets": sets,
    }
    write(request.out / "results.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    write(request.out / "report.html", page(content))
    console.print(f"report: {escape(str(request.out / 'report.html'))}", highlight=False, soft_wrap=True)


def pick_device(device: str) -> torch.device:
    """A device of torch's for what was asked for.

    >>> pick_device("tpu")
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: --device tpu: must be one of cpu, cuda
    """
    if device not in DEVICES:
        raise BadInput(f"--device {device}: must be one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device here; leave it out, or say --device cpu")
    return torch.device(device)


def grid(found: Table) -> Grid:
    """A table for the terminal, within eighty columns; long names are folded."""
    head, lines = found
    drawn = Grid(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold")
    for i, title in enumerate(head):
        drawn.add_column(title, justify="right" if i else "left", no_wrap=i > 0, overflow="fold", vertical="bottom")
    drawn.columns[0].min_width = NAME
    for cells in lines:
        drawn.add_row(*map(escape, cells))
    return drawn


def _sets(request: Request) -> Iterator[ShapeSet]:
    for name in request.shapes.split(","):
        yield shape_set(name.strip().lower(), request.depth)


def _crew(request: Request, shapes: ShapeSet) -> tuple[list[Entrant], list[str]]:
    """Ours, each family followed by its peers; and the packages that are missing."""
    ours = entrants(request.optimizers or DEFAULT, max(max(pair) for pair in shapes.matrices))
    _check_steps(request.steps, ours)
    peers, missing = peers_of(ours, request.peers, request.compiled)
    families = dict.fromkeys(one.family for one in ours)
    return [one for family in families for one in (*ours, *peers) if one.family == family], missing


def _check_steps(steps: int, ours: Sequence[Entrant]) -> None:
    for one in ours:
        if one.family.frequency and steps % one.family.frequency:
            every = one.family.frequency
            raise BadInput(
                f"--steps {steps}: must be a multiple of {every}, since {one.label} refreshes every {every} steps and "
                f"all its refreshes are to count; {steps + -steps % every} is one"
            )
    if steps < 1:
        raise BadInput(f"--steps {steps}: must be at least 1")


def _warmup(request: Request, crew: Sequence[Entrant]) -> int:
    if request.warmup is None:
        return 1 + max(one.family.frequency for one in crew)
    if request.warmup < 1:
        raise BadInput(
            f"--warmup {request.warmup}: must be at least 1: the first step allocates, and decomposes as no other does"
        )
    return request.warmup


def _bench(
    shapes: ShapeSet, crew: Sequence[Entrant], device: torch.device, steps: int, warmup: int, console: Console
) -> dict[str, Any]:
    """One set of shapes, as JSON has it."""
    with console.status("") as status:
        speed = measure_speed(shapes, device)
        found = measure(crew, shapes.matrices, device, steps, warmup, lambda what: status.update(escape(what)))
    return {
        "name": shapes.name,
        "title": str(shapes),
        "about": shapes.about,
        "shapes": [asdict(shape) for shape in shapes.shapes],
        "layers": shapes.layers,
        "of_layers": shapes.of_layers,
        "warmup": warmup,
        "speed": asdict(speed),
        "rows": rows(found, shapes, speed),
    }


def _show(found: dict[str, Any], clock: str, console: Console) -> None:
    speed = found["speed"]
    coarse = f"{speed['bfloat16_flops'] / 1e9:.0f} in bfloat16 ones, " if speed["bfloat16_flops"] else ""
    console.print(f"\n[bold]{escape(found['title'])}[/]", highlight=False)
    console.print(
        f"{speed['flops'] / 1e9:.0f} GFLOP/s in float32 products of these shapes, {coarse}"
        f"{speed['bandwidth'] / 1e9:.0f} GB/s in copies\n",
        highlight=False,
    )
    console.print(grid(times(found["rows"], clock)))
    console.print(FOOTNOTE.format(clock=CLOCKS[clock]), style="dim", highlight=False)
    console.print(grid(phases(found["rows"])))
    console.print(PHASES_NOTE, style="dim", highlight=False)
    for line in comparisons(found["rows"]):
        console.print(escape(line), highlight=False)
    for line in failures(found["rows"]):
        console.print(escape(line), style="red", highlight=False)


def _peer_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
