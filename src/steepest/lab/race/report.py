"""The report: one HTML file that explains itself and works offline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import torch

from steepest.lab.race import figures
from steepest.lab.race.race import Results
from steepest.lab.race.results import Findings
from steepest.lab.race.text import cells, headers, headline, loss, notes, plural, poisoned, settings
from steepest.lab.race.training import DIVERGED
from steepest.lab.race.trial import Run, Trial
from steepest.lab.shared.contenders import routing_table
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.page import card, dot, figure, render, row, section, table
from steepest.lab.workloads.workload import Workload


def page(findings: Findings, results: Results, workload: Workload, command: str) -> str:
    """The whole file."""
    paint = figures.colours(findings.plan)
    body = [
        _opening(findings, results),
        _legend(findings, paint),
        _losses(findings, results, workload),
        _targets(findings),
        _tuning(findings, results),
        _steps(findings, results),
        _summary(findings, paint),
        _all_trials(results),
        _provenance(findings, results, workload, command),
    ]
    return render(f"steepest race: {', '.join(paint)}", body)


def _opening(findings: Findings, results: Results) -> str:
    """The headline and the three numbers that one remembers."""
    plan = findings.plan
    today = datetime.now(UTC).strftime("%d %B %Y")
    facts = [Path(plan.workload).stem, plural(plan.steps, "step"), plural(plan.seeds, "seed")]
    facts += [poisoned(plan.poison)] if plan.poison else []
    kicker = " · ".join(["steepest race", *facts, today])
    claim, losses = headline(findings)
    broken = ""
    if results.interrupted:
        broken = f'<p class="warn">Broken off after {len(results.runs)} runs. The same command continues.</p>'
    return f"""<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(claim)}</h1>
<p class="sub">{escape(losses)}</p>
{broken}
<div class="cards">{"".join(_cards(findings))}</div>
</header>"""


def _cards(findings: Findings) -> Iterable[str]:
    finished = [line for line in findings.lines if math.isfinite(line.final)]
    base = findings.plan.baseline.label

    if finished:
        best = finished[0]
        yield card("Lowest final loss", loss(best.final), best.label)
    rivals = [line for line in finished if line.label != base and line.reach and line.steps_share and line.time_share]
    if rivals:
        frugal = min(rivals, key=lambda line: line.steps_share or math.inf)
        quick = min(rivals, key=lambda line: line.time_share or math.inf)
        bound = "≤ " if frugal.reach and frugal.reach.bound else ""
        yield card(
            f"Fewest steps to {base}'s final loss",
            f"{bound}{frugal.steps_share:.0%}",
            f"of {base}'s, by {frugal.label}",
        )
        bound = "≤ " if quick.reach and quick.reach.bound else ""
        yield card(f"Least {findings.clock} to it", f"{bound}{quick.time_share:.0%}", f"of {base}'s, by {quick.label}")
    if math.isfinite(findings.noise) and findings.plan.seeds > 1:
        yield card("Noise", f"{findings.noise:.2g}", "largest range between seeds")


def _legend(findings: Findings, paint: dict[str, str]) -> str:
    """Buttons that show and hide a contender in all figures."""
    buttons = (
        f'<button type="button" aria-pressed="true" data-label="{escape(line.label)}">'
        f"{dot(paint[line.label])}{escape(line.label)}</button>"
        for line in findings.lines
    )
    return f'<nav aria-label="Show or hide contenders">{"".join(buttons)}</nav>'


def _losses(findings: Findings, results: Results, workload: Workload) -> str:
    band = "Bands: range over seeds. " if findings.plan.seeds > 1 else ""
    target = f"Dashed: where {findings.plan.baseline.label} ends." if findings.target is not None else ""
    measure = workload.measure[:1].upper() + workload.measure[1:]
    return section(
        "Who learns fastest?",
        f"{measure}, for each contender's best setting. Lower is better.",
        figure(
            "Loss over steps", figures.loss_over_steps(findings, results), f"{band}{target} The first drop is cut off."
        ),
        figure(
            f"Loss over {findings.clock}",
            figures.loss_over_time(findings, results),
            "The same runs, against what they cost on this machine: an optimizer whose steps take longer moves right.",
        ),
    )


def _targets(findings: Findings) -> str:
    if findings.target is None:
        return ""
    base = findings.plan.baseline.label
    if findings.plan.shorter:
        how = (
            "Interpolated between runs over several distances, each with a schedule of its own. Hatched: upper bounds."
        )
    else:
        how = (
            "Hatched: upper bounds, from where a run passes the target while its learning rate is still high; "
            "--full runs shorter distances to find out exactly."
        )
    return section(
        f"What does {base}'s final loss cost?",
        f"{base} ends at {loss(findings.target)}. 1.00 is what it takes to get there; shorter is better.",
        figure("Steps to the target", figures.share_of_steps(findings), how),
        figure(
            f"{findings.clock} to the target",
            figures.share_of_time(findings),
            "Solid: forward and backward of the model, the same for all. Pale: the optimizer itself.",
        ),
    )


def _tuning(findings: Findings, results: Results) -> str:
    rates = figures.rate_curves(findings, results)
    distances = figures.loss_by_distance(findings, results)
    shown = []
    if rates is not None:
        caption = (
            "Each point: mean over seeds of the final loss at that rate; the largest is the best. A good optimum has "
            "points on both sides. A cross at the top: at least one seed diverged."
        )
        shown.append(figure("Final loss over learning rate", rates, caption))
    if distances is not None:
        caption = (
            "Each point: a run of its own, decayed to the end. Where a line meets the dashed one: steps to the target."
        )
        shown.append(figure("Final loss over distance", distances, caption))
    return section("How were they tuned?", "", *shown) if shown else ""


def _steps(findings: Findings, results: Results) -> str:
    shown = [
        figure(
            "How long an optimizer step takes",
            figures.step_times(findings, results),
            "Histogram of all steps, on a logarithmic scale; heights are square roots, so that rare steps are seen. "
            "Two humps: steps with and without a refresh.",
        ),
        figure(
            "How far a step goes",
            figures.update_sizes(findings, results),
            "Root mean square of a hidden matrix's update, in learning rates: the median matrix, and dotted the one "
            "that moves furthest. Adam-like steps lie below 1; peaks at the start would be untested step sizes.",
        ),
    ]
    factors = figures.spectra(findings, results, lambda record: record.factor_condition)
    if factors is not None:
        caption = (
            "Largest over smallest eigenvalue of the gradient covariances, median: how unequal directions are, and "
            "what an elementwise optimizer can't see. Shown for those that keep covariances; about 8e6 is rounding."
        )
        shown.append(figure("Condition number of the covariances", factors, caption))
    weights = figures.spectra(findings, results, lambda record: record.weight_spread)
    if weights is not None:
        caption = (
            "Largest over median singular value, in the median matrix. High: few directions carry a weight matrix."
        )
        shown.append(figure("Spread of the weights' singular values", weights, caption))
    return section("What happens in a step?", "", *shown)


def _summary(findings: Findings, paint: dict[str, str]) -> str:
    """The table of the terminal, and each best setting in full."""
    rows, chosen = [], []
    for line in findings.lines:
        label, *numbers = cells(line)
        name = dot(paint[line.label]) + escape(label)
        rows.append(row(name, numbers, first=line is findings.lines[0]))
        chosen.append(row(name, [], [settings(line.best), line.best.provenance]))
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes(findings))
    return (
        f"<h2>In numbers</h2>{table(headers(findings), rows)}<ul class='notes'>{remarks}</ul>"
        f"<details><summary>The best settings</summary>{table(['contender', 'settings', 'from'], chosen)}</details>"
    )


def _all_trials(results: Results) -> str:
    """Every run that there was, failures too."""

    def order(run: Run) -> tuple[str, int, float, int]:
        return run.trial.contender.label, -run.trial.steps, run.trial.contender.lr, run.trial.seed

    def line(trial: Trial, outcome: str, wall: str, remark: str) -> str:
        numbers = [f"{trial.contender.lr:g}", str(trial.steps), str(trial.seed), outcome, wall]
        return row(escape(trial.contender.label), numbers, [remark])

    rows = []
    for run in sorted(results.runs, key=order):
        record = run.record
        outcome = loss(record.final) if math.isfinite(record.final) else f"diverged at {len(record.rate)}"
        rows.append(line(run.trial, outcome, f"{record.wall_seconds:.1f}", settings(run.trial.contender)))
    rows += [line(trial, "failed", "–", reason) for trial, reason in results.failures]
    head = ["contender", "lr", "steps", "seed", "final loss", "seconds\nwall", "settings"]
    return (
        f"<details><summary>All {len(rows)} runs</summary>{table(head, rows)}</details>"
        "<p class='soft'>A run counts as diverged when its loss is no number, or averages more than "
        f"{DIVERGED:g} times its first loss over ten steps.</p>"
    )


def _provenance(findings: Findings, results: Results, workload: Workload, command: str) -> str:
    """All that it takes to get these numbers again."""
    torch.manual_seed(0)
    model = workload.model()
    facts = {
        "command": command,
        **workload.describe(),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        **versions(),
        "machine": machine(),
        "time": f"{findings.clock} of one thread for each run, which other processes hardly disturb; validation and "
        "measurements are not counted",
        "schedule": "linear warm-up, then a cosine to a hundredth",
    }
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return (
        f"<h2>How to get this again</h2><dl>{pairs}</dl>"
        "<details><summary>Which parameter goes to which rule, and why</summary>"
        f"<pre>{escape(routing_table(model))}</pre></details>"
    )
