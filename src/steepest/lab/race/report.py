"""The report of a race: one HTML file that explains itself and works offline. Its text is in report.html."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

import steepest
from steepest.lab.race import figures, text
from steepest.lab.race.results import Result, Results
from steepest.lab.race.text import loss, settings
from steepest.lab.race.training import DIVERGED
from steepest.lab.race.trial import Run
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.report import render
from steepest.lab.shared.table import Table
from steepest.lab.workloads.workload import Workload


def page(results: Results, workload: Workload, command: str) -> str:
    """Return the report as HTML."""
    torch.manual_seed(0)
    model = workload.model()
    provenance = {
        "command": command,
        **workload.describe(),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **versions(),
        "machine": machine(),
        "time": f"{results.clock} of one thread for each run, which other processes hardly disturb; validation and "
        "measurements are not counted",
        "schedule": "linear warm-up, then a cosine to a hundredth",
    }
    return render(
        "race/report.html",
        results=results,
        colours=figures.colours(results),
        facts=list(_facts(results)),
        headline=text.headline(results),
        cards=list(_cards(results)),
        measure=workload.measure[:1].upper() + workload.measure[1:],
        charts=figures,
        factors=figures.spectra(results, lambda record: record.factor_condition),
        weights=figures.spectra(results, lambda record: record.weight_spread),
        loss=loss,
        main_table=text.main_table(results),
        remarks=text.notes(results),
        settings=Table(
            ["contender", "settings", "from"],
            [[result.label, settings(result.best), result.best.provenance] for result in results.entries],
        ),
        trials=_trials(results),
        diverged=f"{DIVERGED:g}",
        provenance_facts=provenance,
        routing=str(steepest.route(model)),
    )


def _facts(results: Results) -> Iterator[str]:
    """Yield the facts that stand above the headline."""
    plan = results.plan
    yield from (Path(plan.workload).stem, text.plural(plan.steps, "step"), text.plural(plan.seeds, "seed"))
    if plan.poison:
        yield text.poisoned(plan.poison)


def _cards(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield the numbers to remember, each with its name and its owner."""
    finished = [result for result in results.entries if math.isfinite(result.final)]
    base = results.plan.baseline.label
    if finished:
        yield "Lowest final loss", loss(finished[0].final), finished[0].label
    rivals = [result for result in finished if result.label != base and result.steps_share and result.time_share]
    if rivals:
        fewest, fastest = text.fewest_steps(rivals), text.least_time(rivals)
        steps, time = _share(fewest, fewest.steps_share), _share(fastest, fastest.time_share)
        yield f"Fewest steps to {base}'s final loss", steps, f"of {base}'s, by {fewest.label}"
        yield f"Least {results.clock} to it", time, f"of {base}'s, by {fastest.label}"
    if math.isfinite(results.noise) and results.plan.seeds > 1:
        yield "Noise", f"{results.noise:.2g}", "largest range between seeds"


def _share(result: Result, share: float | None) -> str:
    bound = "≤ " if result.steps_to_target and result.steps_to_target.bound else ""
    return f"{bound}{share or math.nan:.0%}"


def _trials(results: Results) -> Table:
    """Return a row for every run, failed ones last."""

    def order(run: Run) -> tuple[str, int, float, int]:
        return run.trial.contender.label, -run.trial.steps, run.trial.contender.lr, run.trial.seed

    outcomes = []
    for run in sorted(results.runs.finished, key=order):
        record = run.record
        outcome = loss(record.final) if math.isfinite(record.final) else f"diverged at {len(record.rate)}"
        outcomes.append((run.trial, outcome, f"{record.wall_seconds:.1f}", settings(run.trial.contender)))
    outcomes += [(trial, "failed", "–", reason) for trial, reason in results.runs.failures]
    rows = [
        [trial.contender.label, f"{trial.contender.lr:g}", str(trial.steps), str(trial.seed), *cells]
        for trial, *cells in outcomes
    ]
    return Table(["contender", "lr", "steps", "seed", "final loss", "seconds\nwall", "settings"], rows)
