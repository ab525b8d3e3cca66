"""One call of ``steepest spike``: run the study, print its findings, and write results and report."""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from steepest.lab.shared.charts import GREY, blank, curve
from steepest.lab.shared.device import one_thread, pick_device
from steepest.lab.shared.files import make_folder, write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.report import render
from steepest.lab.spike.study import GRADIENTS, OFFSETS, PRECISIONS, SOLVERS, Setup, Study, study
from steepest.lab.spike.text import angles, as_json, floors, headline, products

PATHS = [(solver, precision) for precision in PRECISIONS for solver in SOLVERS]
COLOURS = dict(zip(PATHS, ("#f0842c", "#d6478f", "#2f7de1", "#12a48b"), strict=True))


def run(device: str, seed: int, out: Path, command: str, console: Console) -> None:
    """Run the study with a device and a seed, and write to a folder what it and its ``command`` line give.

    Raises:
        BadInput: if there is no such device, or the folder can't be made.
    """
    setup = Setup(seed=seed, device=str(pick_device(device, allow_auto=True)))
    make_folder(out)
    with one_thread(), console.status("") as status:
        found = study(setup, lambda case: status.update(Text(case)))
    m, n = setup.shape
    spike = f"step {setup.spike_at + 1} ×{setup.scale:g}"
    lines = [
        f"[bold]steepest spike[/]: {m}×{n}, {setup.steps} steps, {spike}; {setup.tf32} TF32 on {setup.device}",
        f"\nAngle to the basis before the spike, degrees: top eigenvector / top {setup.top}",
        angles(found, offsets=(-10, 1, 2, 10)).for_console(gap=0),
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


def page(study: Study, command: str) -> str:
    """Return the report as HTML."""
    setup = study.setup
    facts = {"command": command, "“high”": f"{setup.tf32} TF32", **versions(), "machine": machine()}
    facts |= {"steps": f"{setup.steps}, spike at {setup.spike_at + 1}", "seed": f"{setup.seed}", "device": setup.device}
    return render(
        "spike/report.html",
        setup=setup,
        headline=headline(study),
        colours={", ".join(path): colour for path, colour in COLOURS.items()},
        charts={guard: curves(study, guard, "isotropic", "leading_deg") for guard in ("absolute", "relative")},
        charts_to_truth={
            guard: curves(study, guard, "directional", "to_truth_deg") for guard in ("absolute", "relative")
        },
        angles={gradients: angles(study, gradients) for gradients in GRADIENTS},
        products=products(study),
        floors=floors(study),
        last=OFFSETS[-1],
        facts=facts,
    )


def curves(study: Study, guard: str, gradients: str, series: str) -> go.Figure:
    """Draw a series of angles over steps, for each solver at each precision."""
    figure = blank("step")
    start = max(study.setup.spike_at - 20, 0)
    for path, colour in COLOURS.items():
        solver, precision = path
        values = study.trace(solver, guard, precision, gradients)[series]
        points = [(i + 1.0, value) for i, value in enumerate(values)][start:]
        dash = "solid" if precision == "high" else "dash"  # where two curves coincide, both are visible
        curve(figure, ", ".join(path), colour, points, dash=dash, width=2.2 if solver == "REKLS" else 3.2)
    figure.add_vline(x=study.setup.spike_at + 1, line={"color": GREY, "width": 1, "dash": "dot"})
    degrees = list(range(0, 91, 15))
    figure.update_yaxes(range=[-3, 93], tickvals=degrees, ticktext=[f"{x}°" for x in degrees])
    return figure
