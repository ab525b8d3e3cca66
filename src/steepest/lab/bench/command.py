"""The command ``steepest bench``: it measures, prints tables, and writes a report."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from steepest.lab.bench import counting, engine, text
from steepest.lab.bench.entrants import DEFAULT, Entrant, parse_entrants
from steepest.lab.bench.peers import peers_of
from steepest.lab.bench.report import page
from steepest.lab.bench.results import bench
from steepest.lab.bench.shapes import ShapeSet, shape_set
from steepest.lab.listing import check
from steepest.lab.shared.device import one_thread, pick_device
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.files import make_folder, write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.peers import PACKAGES

ENGINE_DEFAULT = "soap-f10, kl-soap-f10, muon, lion, adamw"
"""The entrants of --engine if none are named."""


@dataclass(frozen=True)
class Request:
    """The options of the command line."""

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
    count: bool = False
    """Whether steps are counted on a fake GPU, and nothing is measured."""
    lines: bool = False
    engine: bool = False
    """Whether the host's time for many small matrices is measured, whatever the shapes."""


def run(request: Request, console: Console) -> None:
    """Benchmark every set of shapes, print the tables, and write results.json and report.html.

    Raises:
        BadInput: for a request that can't be met, before anything is measured.
    """
    if request.lines and not request.count:
        raise BadInput("--lines: says by what --count counts, so it needs --count")
    for option in ("count", "peers", "shapes", "depth", "warmup") if request.engine else ():
        if getattr(request, option) != getattr(Request, option):
            raise BadInput(f"--engine: measures the engine alone, on shapes of its own; leave out --{option}")
    if request.count:
        for name in request.shapes.split(","):
            shapes = shape_set(name.strip().lower(), request.depth)
            counting.show(shapes, parse_entrants(request.optimizers or DEFAULT, shapes.longest), request.lines, console)
        return
    device = pick_device(request.device)
    if request.compiled and not request.peers:
        raise BadInput("--compiled: is about peers that compile themselves, so it needs --peers")
    if request.steps < 1:
        raise BadInput(f"--steps {request.steps}: must be at least 1")
    if request.warmup is not None and request.warmup < 1:
        raise BadInput(f"--warmup {request.warmup}: must be at least 1: the first step makes full decompositions")
    if request.engine:
        return _run_engine(request, device, console)
    sets = [shape_set(name.strip().lower(), request.depth) for name in request.shapes.split(",")]
    rosters = [_entrants(request, shapes) for shapes in sets]
    make_folder(request.out)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    content: dict[str, Any] = {
        "command": request.command,
        "versions": versions() | check.versions(*PACKAGES),
        "machine": machine(),
        "device": name,
        "threads": 1,
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "steps": request.steps,
        "missing": sorted({package for _, packages in rosters for package in packages}),
        "sets": [],
    }
    console.print(f"[bold]steepest bench[/]: {request.steps} steps, one thread, {escape(name)}", highlight=False)
    for package in content["missing"]:
        note = f'{package} is not installed, so its optimizers are left out: pip install "steepest[peers]"'
        console.print(escape(note), style="yellow", highlight=False)
    for shapes, (entrants, _) in zip(sets, rosters, strict=True):
        warmup = request.warmup or 1 + max(one.family.frequency for one in entrants)
        with one_thread(), console.status("") as status:
            found = bench(shapes, entrants, device, request.steps, warmup, lambda what: status.update(Text(what)))
        content["sets"].append(found)
        _show(found, console)
    write(request.out / "results.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str))
    write(request.out / "report.html", page(content))
    console.print(f"report: {escape(str(request.out / 'report.html'))}", highlight=False, soft_wrap=True)


def _run_engine(request: Request, device: torch.device, console: Console) -> None:
    """Measure the host's time for many small matrices, print the table, and write engine.json."""
    entrants = parse_entrants(request.optimizers or ENGINE_DEFAULT, max(map(max, engine.SHAPES)))
    make_folder(request.out)
    with one_thread(), console.status("many small matrices"):
        rows = engine.measure(entrants, device, request.steps)
    console.print(engine.table(rows).for_console(gap=1))
    console.print(engine.NOTE.format(steps=request.steps, baseline=engine.BASELINE), style="dim", highlight=False)
    content = {"command": request.command, "versions": versions(), "machine": machine(), "rows": rows}
    write(request.out / "engine.json", json.dumps(content, indent=1) + "\n")


def _entrants(request: Request, shapes: ShapeSet) -> tuple[list[Entrant], list[str]]:
    """Return our entrants, each family followed by its peers, and the packages that are missing."""
    ours = parse_entrants(request.optimizers or DEFAULT, shapes.longest)
    for one in ours:
        if (every := one.family.frequency) and request.steps % every:
            raise BadInput(
                f"--steps {request.steps}: must be a multiple of {every}, since {one.label} refreshes every {every} "
                f"steps and all its refreshes are to count; {request.steps + -request.steps % every} is one"
            )
    peers, missing = peers_of(ours, request.peers, request.compiled)
    families = dict.fromkeys(one.family for one in ours)
    return [one for family in families for one in (*ours, *peers) if one.family == family], missing


def _show(found: dict[str, Any], console: Console) -> None:
    rows, clock = found["rows"], found["clock"]
    console.print(f"\n[bold]{escape(found['title'])}[/]\n{text.speed_line(found['speed'])}\n", highlight=False)
    console.print(text.times(rows, clock).for_console(gap=0))
    console.print(text.TIMES_NOTE.format(clock=text.CLOCKS[clock]) + "\n", style="dim", highlight=False)
    console.print(text.phases(rows).for_console(gap=0))
    console.print("\n".join(map(escape, [text.PHASES_NOTE, *text.notes(rows)])), highlight=False)
