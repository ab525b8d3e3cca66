"""One call of ``steepest race``: from the options to the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from steepest.lab.race import race as races
from steepest.lab.race.checks import check_contender, check_workload
from steepest.lab.race.console import ProgressBars
from steepest.lab.race.pool import Pool
from steepest.lab.race.race import Entry, Plan, Runs
from steepest.lab.race.report import page
from steepest.lab.race.results import find_results
from steepest.lab.race.store import Store
from steepest.lab.race.text import as_json, headline, main_table, notes, poisoned
from steepest.lab.shared.contenders import Contender, parse_contenders, parse_sweep, preset
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.presets import PRESETS, QUICK
from steepest.lab.workloads.workload import Workload, canonical, load_workload

SOME_FAILED, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Request:
    """The options of the command line; None where an option was not given."""

    optimizers: str | None
    workload: str
    full: bool
    sweep: list[str]
    steps: int | None
    seconds: float | None
    seeds: int
    poison: float
    workers: int
    out: Path
    command: str


def run(request: Request, console: Console) -> int:
    """Race as requested, show the results, and return the exit status.

    Raises:
        BadInput: for a request that can't be carried out.
    """
    workload = load_workload(request.workload)
    plan = make_plan(request, workload)
    store = Store(request.out / "runs", workload.fingerprint())
    _check(plan, workload)
    _announce(plan, workload, request, console)
    runs = Runs(plan)
    try:
        bars = ProgressBars(console, sum(plan.distances), "seconds" if plan.seconds else "steps")
        with bars.display, Pool(request.workers, bars) as pool:
            races.race(plan, pool, store, runs)
    except KeyboardInterrupt:
        runs.interrupted = True
    _conclude(runs, workload, request, console)
    return INTERRUPTED if runs.interrupted else SOME_FAILED if runs.failures else 0


def make_plan(request: Request, workload: Workload) -> Plan:
    """Return the plan for a request.

    Raises:
        BadInput: for options that exclude each other.
    """
    if request.seconds is not None and (request.steps is not None or request.full):
        other = "--full, which runs shorter distances" if request.full else "--steps"
        raise BadInput(f"--seconds and {other}: only one can say how long trials are; sweep rates by --sweep")
    if request.optimizers is not None:
        contenders = parse_contenders(request.optimizers)
    else:
        contenders = [preset(name) for name in (PRESETS if request.full else QUICK)]
    axes: dict[str, Sequence[Any]] = {}
    for text in request.sweep:
        axes |= parse_sweep(text)

    def entry(contender: Contender) -> Entry:
        wanted = axes or ({"lr": contender.rates} if request.full else {})
        fit = {name: values for name, values in wanted.items() if name != "lr" or "lr" in contender.options}
        return Entry.of(contender, fit)

    steps = 0 if request.seconds else request.steps or workload.steps
    shorter = races.shorter_distances(steps) if request.full else ()
    # The processes of the trials may have another working directory, so the name has the whole path of a file.
    name, entries = canonical(request.workload), tuple(map(entry, contenders))
    return Plan(name, entries, steps, request.seeds, shorter, request.poison, request.seconds or 0.0)


def _check(plan: Plan, workload: Workload) -> None:
    """Check before the race that the workload's first step runs and that all settings are valid."""
    check_workload(Path(plan.workload).name, workload)
    for entry in plan.entries:
        for candidate in entry.candidates:
            if not check_contender(candidate, workload) and plan.poison:
                raise BadInput(
                    f"optimizer {candidate.label}: it evaluates the loss itself, where --poison can't reach gradients"
                )


def _announce(plan: Plan, workload: Workload, request: Request, console: Console) -> None:
    """Print what will be run, and on what machine."""
    names = escape(", ".join(entry.label for entry in plan.entries))
    console.print(f"[bold]steepest race[/]: {names} on {escape(request.workload)}", highlight=False)
    console.print(f"  {len(plan.distances)} runs, {request.workers} at a time with one thread each", highlight=False)
    if plan.poison:
        console.print(f"  {poisoned(plan.poison)} with NaN or infinite entries", highlight=False)
    for name, fact in {**workload.describe(), **versions(), "machine": machine()}.items():
        console.print(f"  [dim]{escape(f'{name}: {fact}')}[/]", highlight=False)


def _conclude(runs: Runs, workload: Workload, request: Request, console: Console) -> None:
    """Print the results, and write them to the report and to results.json."""
    if not runs.finished:
        console.print("No run has finished, so there is nothing to report.")
        return
    results = find_results(runs)
    console.print()
    console.print(main_table(results).for_console(gap=2 if console.width >= 100 else 0, bold_first=True))
    for note in notes(results):
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    claim, losses = headline(results)
    console.print(f"\n[bold]{escape(claim)}[/] {escape(losses)}", highlight=False)
    if runs.interrupted:
        console.print("Interrupted: the same command continues.", style="yellow")
    path = request.out / "report.html"
    write(request.out / "results.json", json.dumps(as_json(results), indent=1))
    write(path, page(results, workload, request.command))
    console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)
