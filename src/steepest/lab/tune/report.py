"""The picture of a search: one HTML file that works offline. Its text is in report.html."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

from steepest.lab.shared.charts import COLOURS, final_losses
from steepest.lab.shared.report import render
from steepest.lab.tune import text
from steepest.lab.tune.search import Search


def page(search: Search, task: str, measure: str, facts: Mapping[str, str]) -> str:
    """Return the final loss over the learning rate, with a curve for the rates and a point for each other setting."""
    samples: dict[str, list[tuple[float, list[float]]]] = {}
    for setting, final in search.tried:
        samples.setdefault(setting.variant or "all rates together", []).append((setting.lr, [final]))
    colours = dict(zip(samples, cycle(COLOURS), strict=False))
    return render(
        "tune/report.html",
        kicker=["steepest tune", search.start.label, task, f"{search.steps} steps"],
        headline=text.headline(search),
        measure=measure[:1].upper() + measure[1:],
        colours=colours,
        chart=final_losses("learning rate", {label: sorted(found) for label, found in samples.items()}, colours),
        table=text.table(search),
        remarks=text.notes(search),
        code=text.code(search.best.contender) if search.best else "",
        provenance_facts=facts,
    )
