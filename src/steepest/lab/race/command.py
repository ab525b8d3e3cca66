"""One call of ``steepest race``: from what was typed to the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from steepest.lab.race import race as races
from steepest.lab.race import report
from steepest.lab.race import results as findings
from steepest.lab.race.console import Board, table
from steepest.lab.race.pool import Crew
from steepest.lab.race.race import Entry, Plan, Results
from steepest.lab.race.store import Store
from steepest.lab.race.text import as_json, headline, notes, poisoned
from steepest.lab.shared.contenders import Contender, parse_contenders, parse_sweep, preset
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.presets import PRESETS, QUICK
from steepest.lab.workloads.workload import Workload, load_workload

SOME_FAILED, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Request:
    """What was typed, option by option; None where nothing was."""

    optimizers: str | None
    workload: str
    full: bool
    sweep: list[str]
    steps: int | None
    seeds: int
    workers: int
    out: Path
    fresh: bool
    command: str
    poison: float = 0.0


def run(request: Request, console: Console) -> int:
    """Race as requested, and show what happened; BadInput if it can't be done. Returns the exit status."""
    workload = load_workload(request.workload)
    plan = make_plan(request, workload)
    store = Store(request.out / "runs", workload.fingerprint(), request.fresh)
    _try_out(plan, workload)
    _announce(plan, workload, request, console)
    results = Results(plan)
    try:
        with Board(console, plan.total_steps) as board:
            races.race(plan, Crew(request.workers, board), store, results)
    except KeyboardInterrupt:
        results.interrupted = True
    _conclude(results, workload, request, console)
    return INTERRUPTED if results.interrupted else SOME_FAILED if results.failures else 0


def make_plan(request: Request, workload: Workload) -> Plan:
    """Who runs how far."""
    if request.optimizers is not None:
        contenders = parse_contenders(request.optimizers)
    else:
        contenders = [preset(name) for name in (PRESETS if request.full else QUICK)]
    axes: dict[str, list[Any]] = {}
    for text in request.sweep:
        axes |= parse_sweep(text)

    def entry(contender: Contender) -> Entry:
        if axes:
            return Entry.swept(contender, axes)
        return Entry.swept(contender) if request.full else Entry.preset(contender)

    # Each run has a process of its own, with a working directory that may not be ours to count on.
    name = str(Path(request.workload).resolve()) if request.workload.endswith(".py") else request.workload
    steps = request.steps or workload.steps
    shorter = races.shorter_distances(steps) if request.full else ()
    return Plan(name, tuple(map(entry, contenders)), steps, request.seeds, shorter, request.poison)


def _try_out(plan: Plan, workload: Workload) -> None:
    """Find out before the race what can't work: a workload's first step, and every contender's options."""
    torch.manual_seed(0)
    try:
        model = workload.model()
        loss = workload.loss(model, workload.batch(torch.Generator().manual_seed(0)))
        torch.autograd.backward(loss)
        with torch.no_grad():
            float(workload.validation(model))
    except Exception as error:
        raise BadInput(f"workload {Path(plan.workload).name}: {one_line(error)}") from error
    for entry in plan.entries:
        for candidate in entry.candidates:
            candidate.check(model)


def _announce(plan: Plan, workload: Workload, request: Request, console: Console) -> None:
    """What is about to happen, and on what."""
    names = escape(", ".join(entry.label for entry in plan.entries))
    console.print(f"[bold]steepest race[/]: {names} on {escape(request.workload)}", highlight=False)
    console.print(f"  {plan.total_trials} runs, {request.workers} at a time with one thread each", highlight=False)
    if plan.poison:
        console.print(f"  {poisoned(plan.poison)} with NaN or infinite entries", highlight=False)
    for name, fact in {**workload.describe(), **versions(), "machine": machine()}.items():
        console.print(f"  [dim]{escape(f'{name}: {fact}')}[/]", highlight=False)


def _conclude(results: Results, workload: Workload, request: Request, console: Console) -> None:
    """The table, the report, and where it lies."""
    if not results.runs:
        console.print("No run has finished, so there is nothing to report.")
        return
    found = findings.find(results)
    console.print()
    console.print(table(found, console.width))
    for note in notes(found):
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    claim, losses = headline(found)
    console.print(f"\n[bold]{escape(claim)}[/] {escape(losses)}", highlight=False)
    if results.interrupted:
        console.print("Broken off: the same command continues.", style="yellow")
    path = request.out / "report.html"
    write(request.out / "results.json", json.dumps(as_json(found), indent=1))
    write(path, report.page(found, results, workload, request.command))
    console.print(f"report: {escape(str(path))}", highlight=False, soft_wrap=True)
