"""Progress bars of a race, for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import progress
from rich.console import Console
from rich.markup import escape

from steepest.lab.race.trial import Record, Trial, loss


class ProgressBars:
    """A bar for the race, one for each trial that runs, and a line for each that has ended; safe to call in threads.

    Args:
        console: Where they are shown.
        total: The steps, or seconds, of all trials; None if it is not known.
        unit: What it counts.
        name: How trials are called.
    """

    def __init__(
        self,
        console: Console,
        total: float | None,
        unit: str = "steps",
        name: Callable[[Trial], str] = str,
    ) -> None:
        self.name = name
        self.display = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[losses]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self.race = self.display.add_task(f"{unit} of finished runs", total=total, losses="")
        self.trials: dict[str, progress.TaskID] = {}

    def skipped(self, trial: Trial) -> None:
        """Count a trial that was run before as done."""
        self.display.advance(self.race, trial.length)

    def started(self, trial: Trial) -> None:
        """Add a bar."""
        label = self.name(trial)
        self.trials[label] = self.display.add_task(label, total=trial.length, losses="starting")

    def progress(self, trial: Trial, done: float, train: float, validation: float | None) -> None:
        """Advance the trial's bar to what is done, and show its last losses."""
        losses = f"train {loss(train)}" + (f"  val {loss(validation)}" if validation is not None else "")
        self.display.update(self.trials[self.name(trial)], completed=done, losses=losses)

    def ended(self, trial: Trial, outcome: Record | str) -> None:
        """Replace the bar by a line with the final loss, or with the reason why there is none."""
        self.display.advance(self.race, trial.length)
        if (bar := self.trials.pop(self.name(trial), None)) is not None:
            self.display.remove_task(bar)
        if isinstance(outcome, str):
            result = f"[red]failed[/]: {escape(outcome)}"
        else:
            final = loss(outcome.final) if outcome.status == "finished" else "[red]diverged[/]"
            result = f"{final}  [dim]{outcome.wall_seconds:.0f} s[/]"
        self.display.console.print(f"  {escape(self.name(trial))}: {result}", highlight=False)
