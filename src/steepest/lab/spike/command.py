"""The command ``steepest spike``: run the study, show what it found, and write it down."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from steepest.lab.shared.device import one_thread, pick_device
from steepest.lab.shared.files import make_folder, write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.spike.measures import study
from steepest.lab.spike.report import page, tf32
from steepest.lab.spike.study import Setup
from steepest.lab.spike.text import Table, angles, as_json, eigenvalues, findings, headline, products


@dataclass(frozen=True)
class Request:
    """What the command line was asked for."""

    device: str
    seed: int
    out: Path
    command: str


def run(request: Request, console: Console) -> None:
    """All of it, on the device and with the seed that were asked for.

    Raises:
        BadInput: if there is no such device, or the folder can't be made.
    """
    setup = replace(Setup(), seed=request.seed, device=str(pick_device(request.device, allow_auto=True)))
    make_folder(request.out)
    with one_thread(), console.status("") as status:
        found = study(setup, lambda what: status.update(escape(what)))
    m, n = setup.shape
    console.print(
        f"[bold]steepest spike[/]: {m}×{n}, {setup.steps} steps, step {setup.spike_at + 1} ×{setup.scale:g}; "
        f"{tf32(found)} on {setup.device}",
        highlight=False,
    )
    console.print(f"\nAngle to the basis before the spike, degrees: top eigenvector / top {setup.top}", highlight=False)
    console.print(grid(angles(found, before=(10,))))
    console.print("\nEigenvalues of L: REKLS, absolute eps, high", highlight=False)
    console.print(grid(eigenvalues(found, "absolute", "high"), 1))
    console.print("\nThe same angles, absolute eps, with TF32 in some products only", highlight=False)
    console.print(grid(products(found), 2))
    console.print()
    for finding in findings(found):
        console.print(f"[dim]{escape(finding)}[/]", highlight=False)
    claim, more = headline(found)
    console.print(f"\n[bold]{escape(claim)}[/] {escape(more)}", highlight=False)
    provenance = {"command": request.command, **versions(), "machine": machine()}
    write(request.out / "results.json", json.dumps(provenance | as_json(found), indent=1, ensure_ascii=False))
    path = request.out / "report.html"
    write(path, page(found, request.command))
    console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)


def grid(found: Table, labels: int = 3) -> Grid:
    """A table for the terminal."""
    head, rows = found
    drawn = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for i, title in enumerate(head):
        drawn.add_column(title, justify="left" if i < labels else "right", no_wrap=i >= labels)
    for cells in rows:
        drawn.add_row(*map(escape, cells))
    return drawn
