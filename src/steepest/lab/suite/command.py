"""One call of ``steepest suite``: from the options to the results."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steepest.lab.race.checks import check_contender, check_workload
from steepest.lab.race.console import ProgressBars
from steepest.lab.race.pool import Pool
from steepest.lab.race.store import Store
from steepest.lab.shared.contenders import Contender, parse_contenders, preset, split
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.peers import RACING, is_installed
from steepest.lab.shared.presets import BASELINE
from steepest.lab.suite.log import rows_from_json
from steepest.lab.suite.report import page
from steepest.lab.suite.results import as_json, dumps
from steepest.lab.suite.running import Runner, parse_budget
from steepest.lab.suite.suite import Column, Suite, Task
from steepest.lab.suite.text import TITLES, by_workload, headline, means, notes, stage
from steepest.lab.workloads.workload import SUITE, Workload, canonical, load_workload

INTERRUPTED, SOME_FAILED = 130, 1
CONTENDERS = (
    *("adamw", "soap-f5", "muon", "kl-soap", "soap", "soap-f10", "kl-soap-f4", "normuon", "shampoo", "lion"),
    *("sgd", "kl-shampoo", "adamuon", "moso", "dion", "dion2", "kfac", "ekfac"),
)
"""The contenders of a suite that names none, in the order in which they run; a budget drops the last ones.

Last come those of other libraries, a check on our own, where they are installed.
"""


@dataclass(frozen=True)
class Request:
    """The options of the command line; None where an option was not given."""

    optimizers: str | None
    workloads: str | None
    budget: str | None
    start: Path | None
    """A file with results to go on from."""
    workers: int
    out: Path
    command: str


def run(request: Request, console: Console) -> int:
    """Run the suite as requested, write its results, and return the exit status.

    Raises:
        BadInput: for a request that can't be carried out.
    """
    budget = None if request.budget is None else parse_budget(request.budget)
    workloads = _workloads(request.workloads)
    suite = make_suite(_contenders(request.optimizers), workloads)
    reused = _take_rows(suite, request.start)
    stores = {task.name: Store(request.out / "runs" / _file_name(task), task.fingerprint) for task in suite.tasks}
    _announce(suite, request, reused, console)
    names = {task.spec: task.name for task in suite.tasks}
    bars = ProgressBars(console, None, name=lambda trial: f"{names[trial.workload]}: {trial}")

    def finished(contender: Contender, column: Column) -> None:
        reached = stage(_write(runner, request), contender.label, column)
        console.print(f"[bold]{escape(contender.label)}[/], {reached}", highlight=False)

    runner = Runner(suite, Pool(request.workers, bars), stores, budget, finished)
    status = 0
    try:
        with bars.display, runner.pool:
            runner.run()
    except KeyboardInterrupt:
        status = INTERRUPTED
    _conclude(runner, request, console, interrupted=bool(status))
    return status or (SOME_FAILED if any(row.failure for row in suite.log) else 0)


def make_suite(contenders: list[Contender], workloads: dict[str, tuple[str, Workload]]) -> Suite:
    """Return the suite of these contenders, AdamW first, and of workloads by name, each with what it is loaded by.

    Raises:
        BadInput: for a workload that fails, or a contender that can't train any workload.
    """
    baseline = next((c for c in contenders if c.rule == BASELINE), preset(BASELINE))
    contenders = [baseline, *(c for c in contenders if c is not baseline)]
    for contender in contenders:
        if not contender.lr:
            raise BadInput(f"optimizer {contender.label}: it has no learning rate to tune; race it by steepest race")
    for name, (_, workload) in workloads.items():
        check_workload(name, workload)
    refused = {
        (contender.label, name): reason
        for contender in contenders
        for name, (_, workload) in workloads.items()
        if (reason := _refusal(contender, workload))
    }
    for contender in contenders:
        reasons = [reason for (label, _), reason in refused.items() if label == contender.label]
        if len(reasons) == len(workloads) or (reasons and contender is baseline):
            raise BadInput(f"optimizer {contender.label}: {reasons[0]}")
    tasks = tuple(
        Task(name, spec, workload.suite_steps, workload.fingerprint(), workload.measure)
        for name, (spec, workload) in workloads.items()
    )
    return Suite(tasks, tuple(contenders), refused)


def _refusal(contender: Contender, workload: Workload) -> str:
    """Return why the contender can't train the workload; empty if it can."""
    try:
        if not check_contender(contender, workload):
            return (
                "it evaluates the loss itself, so its steps compare with nobody's: race it by steepest race --seconds"
            )
    except BadInput as error:
        return str(error).removeprefix(f"optimizer {contender.label}: ")
    return ""


def _contenders(text: str | None) -> list[Contender]:
    names = (*CONTENDERS, *filter(is_installed, RACING))
    return [preset(name) for name in names] if text is None else parse_contenders(text)


def _workloads(text: str | None) -> dict[str, tuple[str, Workload]]:
    """Return workloads by their name in the results, each with what the processes of trials load it by.

    Raises:
        BadInput: for unknown workloads, or two of one name.
    """
    found: dict[str, tuple[str, Workload]] = {}
    for spec in SUITE if text is None else [part.strip() for part in split(text) if part.strip()]:
        full = canonical(spec)
        name = Path(full).name.replace(".py", "", 1)
        if name in found:
            raise BadInput(f"workload {name} is named twice")
        found[name] = (full, load_workload(spec))
    if not found:
        raise BadInput("no workload is named")
    return found


def _take_rows(suite: Suite, path: Path | None) -> int:
    """Take rows of a file with results into the log, and return how many; others' workloads have other fingerprints.

    Raises:
        BadInput: if the file can't be read, or holds no results of a suite.
    """
    if path is None:
        return 0
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"--from {path}: {one_line(error)}") from error
    rows = list(rows_from_json(results, f"--from {path}"))
    fingerprints = {workload["name"]: workload["fingerprint"] for workload in results["workloads"]}
    same = {task.name for task in suite.tasks if fingerprints.get(task.name) == task.fingerprint}
    for row in rows:
        if row.workload in same:
            suite.log.add(row)
    return sum(row.workload in same for row in rows)


def _file_name(task: Task) -> str:
    """Return the name of the folder with a task's runs."""
    return re.sub(r"[^a-z0-9.]+", "-", task.name.lower()).strip("-")


def _announce(suite: Suite, request: Request, reused: int, console: Console) -> None:
    """Print what will be run, and on what machine."""
    names = ", ".join(contender.label for contender in suite.contenders)
    console.print(f"[bold]steepest suite[/]: {escape(names)}", highlight=False)
    if request.optimizers is None and (absent := [name for name in RACING if not is_installed(name)]):
        remedy = 'not installed: pip install "steepest[peers]"'
        console.print(f"  without {', '.join(absent)}, {escape(remedy)}", highlight=False)
    console.print(f"  on {escape(', '.join(task.name for task in suite.tasks))}", highlight=False)
    console.print(f"  {request.workers} runs at a time with one thread each", highlight=False)
    if request.start is not None:
        console.print(f"  {reused} runs are taken from {escape(str(request.start))}", highlight=False)
    for (label, task), reason in suite.refused.items():
        console.print(f"  {escape(f'{label} can not train {task}: {reason}')}", highlight=False)
    for name, fact in {**versions(), "machine": machine()}.items():
        console.print(f"  [dim]{escape(f'{name}: {fact}')}[/]", highlight=False)


def _write(runner: Runner, request: Request) -> dict[str, Any]:
    """Write the results so far, and the leaderboard, and return the results."""
    results = as_json(runner.suite, runner.left_out, request.command)
    write(request.out / "suite.json", dumps(results))
    write(request.out / "suite.html", page(results))
    return results


def fits(console: Console, table: Table) -> bool:
    """Return whether no column of a table is cut."""
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width


def _conclude(runner: Runner, request: Request, console: Console, interrupted: bool) -> None:
    """Print the tables and write the results."""
    results = _write(runner, request)
    for column, title in TITLES.items():
        if results["summary"][column]:
            console.print(f"\n[bold]{title}[/]")
            console.print(means(results, column).for_console(gap=2))
            cells = by_workload(results, column).transposed().for_console()
            if fits(console, cells):  # the leaderboard has them in any case
                console.print(cells)
    for note in notes(results):
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    console.print(f"\n[bold]{escape(headline(results))}[/]", highlight=False)
    if interrupted:
        console.print("Interrupted: the same command continues.", style="yellow")
    console.print(f"leaderboard: {escape(str(request.out / 'suite.html'))}", highlight=False, soft_wrap=True)
