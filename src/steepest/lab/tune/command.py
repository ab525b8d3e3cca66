"""One call of ``steepest tune``: from the options to the best setting."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from steepest.lab.race.checks import check_contender, check_workload
from steepest.lab.race.console import ProgressBars
from steepest.lab.race.pool import Pool
from steepest.lab.race.store import Store
from steepest.lab.shared.contenders import Contender, parse_contenders
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.files import write
from steepest.lab.shared.fingerprints import machine, versions
from steepest.lab.shared.peers import RACING
from steepest.lab.suite.protocol import edges
from steepest.lab.suite.running import parse_budget
from steepest.lab.tune import text
from steepest.lab.tune.report import page
from steepest.lab.tune.search import Search
from steepest.lab.workloads.workload import Workload, canonical, load_workload

INTERRUPTED, SOME_FAILED = 130, 1


@dataclass(frozen=True)
class Request:
    """The options of the command line; None where an option was not given."""

    workload: str
    optimizer: str
    trials: int
    budget: str | None
    steps: int | None
    out: Path
    command: str


def run(request: Request, console: Console) -> int:
    """Search as requested, show and save the best setting, and return the exit status.

    Raises:
        BadInput: for a request that can't be carried out.
    """
    budget = math.inf if request.budget is None else parse_budget(request.budget)
    start, workload = _optimizer(request.optimizer), load_workload(request.workload)
    check_workload(Path(request.workload).name, workload)
    if not check_contender(start, workload) or not start.lr:
        raise BadInput(f"optimizer {start.label}: it chooses the lengths of its steps, so there is no rate to tune")
    search = Search(canonical(request.workload), start, request.steps or workload.steps, request.trials, budget)
    store = Store(request.out / "runs", workload.fingerprint())
    on = escape(f"{start.label} on {request.workload}, {search.steps} steps, up to {request.trials} settings")
    console.print(f"[bold]steepest tune[/]: {on}", highlight=False)
    bars, interrupted = ProgressBars(console, None, "settings"), False
    try:
        with bars.display, Pool(1, bars) as pool:
            search.run(pool, store)
    except KeyboardInterrupt:
        interrupted = True
    if search.tried:
        _conclude(search, workload, request, console)
    if interrupted:
        console.print("Interrupted: the same command continues.", style="yellow")
        return INTERRUPTED
    if search.next_setting is not None:
        ended = f"The budget ended the search after {len(search.tried)} of up to {request.trials} settings"
        console.print(f"{ended}: a larger one goes on.", style="yellow", highlight=False)
    return SOME_FAILED if search.best is None or any(row.failure for row in search.rows) else 0


def _optimizer(spec: str) -> Contender:
    """Return the one optimizer that is named.

    Raises:
        BadInput: for several, or one of another library.
    """
    (start, *others) = parse_contenders(spec)
    if others:
        raise BadInput(f"--optimizer {spec}: give one; steepest race compares several")
    if start.rule in RACING:
        raise BadInput(
            f"--optimizer {spec}: it is another library's; steepest suite tunes it and compares it with ours"
        )
    return start


def _conclude(search: Search, workload: Workload, request: Request, console: Console) -> None:
    """Print the trials and the best setting, and write them to files."""
    found: dict[str, Any] | None = None
    if search.best is not None:
        best, final = search.best
        found = best.settings() | {"loss": final, "edges": edges(search.tried), "code": text.code(best)}
    facts = {"command": request.command, **versions(), "machine": machine()}
    saved = facts | {
        "workload": search.workload,
        "steps": search.steps,
        "optimizer": search.start.label,
        "complete": search.next_setting is None,
        "best": found,
        "trials": [
            {
                "settings": row.settings,
                "loss": row.loss if math.isfinite(row.loss) else None,
                "seconds": row.cpu_seconds,
            }
            for row in search.rows
        ],
    }
    picture = page(search, Path(request.workload).name, workload.measure, facts | workload.describe())
    for name, content in {"tune.json": json.dumps(saved, indent=1), "report.html": picture}.items():
        write(request.out / name, content)
    console.print()
    console.print(text.table(search).for_console())
    for note in text.notes(search):
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    console.print(f"\n[bold]{escape(text.headline(search))}[/]", highlight=False)
    if search.best:
        console.print(f"\n{escape(text.code(search.best.contender))}\n", highlight=False, soft_wrap=True)
    console.print(f"saved: {escape(str(request.out))}/tune.json, report.html", highlight=False, soft_wrap=True)
