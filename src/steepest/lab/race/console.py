"""Progress bars of a race, for the terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

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

from steepest.lab.race.text import loss
from steepest.lab.race.trial import Run, Trial


class ProgressBars:
    """A bar for the race, one for each trial that runs, and a line for each that has ended; a listener of the pool."""

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
            transient=True,
            disable=not console.is_terminal,
        )
        self.race = self.bars.add_task("[bold]all steps", total=total_steps, losses="")
        self.trials: dict[str, TaskID] = {}
        self.steps: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.bars.stop()

    def skipped(self, trial: Trial) -> None:
        """Count the trial as done."""
        self._advance(trial, trial.steps)

    def started(self, trial: Trial) -> None:
        """Add a bar."""
        bar = self.bars.add_task(escape(str(trial)), total=trial.steps, losses="starting")
        self.trials[trial.literal()] = bar

    def progress(self, trial: Trial, step: int, train: float, validation: float | None) -> None:
        """Advance the trial's bar."""
        losses = f"train {loss(train)}" + (f"  val {loss(validation)}" if validation is not None else "")
        self._advance(trial, step)
        self.bars.update(self.trials[trial.literal()], completed=step, losses=losses)

    def finished(self, run: Run) -> None:
        """Replace the bar by a line with the final loss."""
        outcome = loss(run.record.final) if run.record.status == "finished" else "[red]diverged[/]"
        self._end(run.trial, f"{outcome}  [dim]{run.record.wall_seconds:.0f} s[/]")

    def failed(self, trial: Trial, reason: str) -> None:
        """Replace the bar by a line with the reason."""
        self._end(trial, f"[red]failed[/]: {escape(reason)}")

    def _end(self, trial: Trial, outcome: str) -> None:
        self._advance(trial, trial.steps)  # steps that a diverged trial did not run count as done
        if (bar := self.trials.pop(trial.literal(), None)) is not None:
            self.bars.remove_task(bar)
        self.bars.console.print(f"  {escape(str(trial))}: {outcome}", highlight=False)

    def _advance(self, trial: Trial, step: int) -> None:
        """Advance the bar of the race by the steps that the trial has made since."""
        self.bars.advance(self.race, step - self.steps.get(trial.literal(), 0))
        self.steps[trial.literal()] = step
