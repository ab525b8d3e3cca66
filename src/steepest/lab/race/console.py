"""What the terminal shows: progress while trials run, then the table."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from steepest.lab.race.results import Findings
from steepest.lab.race.text import cells, headers, loss
from steepest.lab.race.trial import Run, Trial


class Board:
    """Progress bars: one for the race, one for each trial that runs, with its losses. Hears of it all from the crew."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.race = self.bars.add_task("[bold]all steps", total=total_steps, losses="")
        self.trials: dict[str, TaskID] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bars.stop()

    def skipped(self, trial: Trial) -> None:
        """Counted as done."""
        self.bars.advance(self.race, trial.steps)

    def started(self, trial: Trial) -> None:
        """Gets a bar."""
        with self.lock:
            self.trials[trial.literal()] = self.bars.add_task(escape(str(trial)), total=trial.steps, losses="starting")

    def news(self, trial: Trial, step: int, train: float, validation: float | None) -> None:
        """The bar grows."""
        bar = self.trials[trial.literal()]
        losses = f"train {loss(train)}" + (f"  val {loss(validation)}" if validation is not None else "")
        with self.lock:
            self.bars.advance(self.race, step - self.bars.tasks[self.bars.task_ids.index(bar)].completed)
            self.bars.update(bar, completed=step, losses=losses)

    def ended(self, trial: Trial) -> None:
        """The bar goes; what a diverged trial didn't run counts as done."""
        with self.lock:
            bar = self.trials.pop(trial.literal())
            self.bars.advance(self.race, trial.steps - self.bars.tasks[self.bars.task_ids.index(bar)].completed)
            self.bars.remove_task(bar)

    def finished(self, run: Run) -> None:
        """A line that stays."""
        record = run.record
        outcome = loss(record.final) if record.status == "finished" else "[red]diverged[/]"
        self.bars.console.print(
            f"  {escape(str(run.trial))}: {outcome}  [dim]{record.wall_seconds:.0f} s[/]", highlight=False
        )

    def failed(self, trial: Trial, reason: str) -> None:
        """A line that stays."""
        self.bars.console.print(f"  {escape(str(trial))}: [red]failed[/]: {escape(reason)}", highlight=False)


def table(findings: Findings, width: int) -> Table:
    """One line for each entry, within eighty columns unless labels are long."""
    gap = 1 if width >= 100 else 0
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, gap), pad_edge=False, show_edge=False, header_style="bold")
    for i, header in enumerate(headers(findings)):
        grid.add_column(header, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for line in findings.lines:
        grid.add_row(*map(escape, cells(line)), style="bold" if line is findings.lines[0] else "")
    return grid
