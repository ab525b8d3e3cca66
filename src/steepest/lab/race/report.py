"""The report of a race: one HTML file that explains itself and works offline. Its text is in report.html."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import steepest
from steepest.lab.race import figures, text
from steepest.lab.race.results import Results
from steepest.lab.race.training import DIVERGED
from steepest.lab.race.trial import Run, Trial, distance, loss
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.report import render
from steepest.lab.shared.table import Table
from steepest.lab.workloads.workload import Workload


def page(results: Results, workload: Workload, command: str) -> str:
    """Return the report as HTML."""
    torch.manual_seed(0)
    model, plan = workload.model(), results.plan
    poison = [text.poisoned(plan.poison)] if plan.poison else []
    provenance = {
        "command": command,
        **workload.describe(),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **versions(),
        "machine": machine(),
        "time": f"{results.clock} of one thread for each run, which other processes hardly disturb; validation and "
        "measurements are not counted",
        "schedule": "linear warm-up, then a cosine to a hundredth; none for optimizers that evaluate the loss",
    }
    return render(
        "race/report.html",
        results=results,
        colours=figures.colours(results),
        facts=[Path(plan.workload).stem, distance(plan.steps, plan.seconds), text.plural(plan.seeds, "seed"), *poison],
        headline=text.headline(results),
        measure=workload.measure[:1].upper() + workload.measure[1:],
        charts=figures,
        loss=loss,
        main_table=text.main_table(results),
        columns=text.columns(results),
        remarks=text.notes(results),
        settings=Table(
            ["contender", "settings", "from"],
            [[result.label, text.settings(result.best), result.best.provenance] for result in results.entries],
        ),
        trials=_trials(results),
        diverged=f"{DIVERGED:g}",
        provenance_facts=provenance,
        routing=str(steepest.route(model)),
    )


def _trials(results: Results) -> Table:
    """Return a row for every run, failed ones last."""

    def row(trial: Trial, *cells: str) -> list[str]:
        length = distance(trial.steps, trial.seconds)
        return [trial.contender.label, trial.contender.rate, length, str(trial.seed), *cells]

    def order(run: Run) -> tuple[str, float, float, int]:
        return run.trial.contender.label, -run.trial.length, run.trial.contender.lr, run.trial.seed

    rows = []
    for run in sorted(results.runs.finished, key=order):
        record, settings = run.record, text.settings(run.trial.contender)
        outcome = loss(record.final) if math.isfinite(record.final) else f"diverged at {len(record.model_seconds)}"
        rows.append(row(run.trial, outcome, f"{record.wall_seconds:.1f}", settings))
    rows += [row(trial, "failed", "–", reason) for trial, reason in results.runs.failures]
    return Table(["contender", "lr", "length", "seed", "final loss", "seconds\nwall", "settings"], rows)
