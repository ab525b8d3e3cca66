"""One call of ``steepest spike``: run the study, print its findings, and write results and report."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from steepest.lab.shared.device import one_thread, pick_device
from steepest.lab.shared.files import make_folder, write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.spike.report import page
from steepest.lab.spike.study import Setup, study
from steepest.lab.spike.text import angles, as_json, floors, headline, products


def run(device: str, seed: int, out: Path, command: str, console: Console) -> None:
    """Run the study with a device and a seed, and write to a folder what it and its ``command`` line give.

    Raises:
        BadInput: if there is no such device, or the folder can't be made.
    """
    setup = Setup(seed=seed, device=str(pick_device(device, allow_auto=True)))
    make_folder(out)
    with one_thread(), console.status("") as status:
        found = study(setup, lambda case: status.update(escape(case)))
    m, n = setup.shape
    spike = f"step {setup.spike_at + 1} ×{setup.scale:g}"
    lines = [
        f"[bold]steepest spike[/]: {m}×{n}, {setup.steps} steps, {spike}; {setup.tf32} on {setup.device}",
        f"\nAngle to the basis before the spike, degrees: top eigenvector / top {setup.top}",
        angles(found, before=(10,), after=(1, 2, 10)).for_console(gap=0),
        "\nThe same angles, absolute eps, with only some products in TF32",
        products(found).for_console(gap=0),
        "\nDifference of L between the precisions, REKLS",
        floors(found).for_console(),
        "\n[bold]{}[/] {}".format(*map(escape, headline(found))),
    ]
    for line in lines:
        console.print(line, highlight=False)
    provenance = {"command": command, **versions(), "machine": machine()}
    write(out / "results.json", json.dumps(provenance | as_json(found), indent=1, ensure_ascii=False))
    path = out / "report.html"
    write(path, page(found, command))
    console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)
