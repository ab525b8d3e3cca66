"""The report of the spike study: one HTML file that works offline. Its text is in report.html."""

from __future__ import annotations

import plotly.graph_objects as go

from steepest.lab.shared.charts import GREY, blank, curve
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.report import render
from steepest.lab.spike import text
from steepest.lab.spike.study import GRADIENTS, OFFSETS, PRECISIONS, SOLVERS, Study

PATHS = [(solver, precision) for precision in PRECISIONS for solver in SOLVERS]
COLOURS = dict(zip(PATHS, ("#f0842c", "#d6478f", "#2f7de1", "#12a48b"), strict=True))


def page(study: Study, command: str) -> str:
    """Return the report as HTML."""
    setup = study.setup
    facts = {"command": command, "“high”": setup.tf32, **versions(), "machine": machine()}
    facts |= {"steps": f"{setup.steps}, spike at {setup.spike_at + 1}", "seed": f"{setup.seed}", "device": setup.device}
    return render(
        "spike/report.html",
        setup=setup,
        headline=text.headline(study),
        colours={", ".join(path): colour for path, colour in COLOURS.items()},
        charts={
            "absolute": angles(study, "absolute", "isotropic", "leading_deg"),
            "relative": angles(study, "relative", "isotropic", "leading_deg"),
            "absolute_to_truth": angles(study, "absolute", "directional", "to_truth_deg"),
            "relative_to_truth": angles(study, "relative", "directional", "to_truth_deg"),
        },
        angles={gradients: text.angles(study, gradients) for gradients in GRADIENTS},
        products=text.products(study),
        floors=text.floors(study),
        last=OFFSETS[-1],
        facts=facts,
    )


def angles(study: Study, guard: str, gradients: str, series: str) -> go.Figure:
    """Draw a series of angles over steps, for each solver at each precision."""
    figure = blank("step")
    start = max(study.setup.spike_at - 20, 0)
    for path, colour in COLOURS.items():
        solver, precision = path
        values: list[float] = getattr(study.trace(solver, guard, precision, gradients), series)
        points = [(i + 1.0, value) for i, value in enumerate(values)][start:]
        dash = "solid" if precision == "high" else "dash"  # where two curves coincide, both are visible
        curve(figure, ", ".join(path), colour, points, dash=dash, width=2.2 if solver == "REKLS" else 3.2)
    figure.add_vline(x=study.setup.spike_at + 1, line={"color": GREY, "width": 1, "dash": "dot"})
    degrees = list(range(0, 91, 15))
    figure.update_yaxes(range=[-3, 93], tickvals=degrees, ticktext=[f"{x}°" for x in degrees])
    return figure
