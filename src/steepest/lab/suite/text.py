"""The words of the suite: its table, and what a reader must know to read it correctly."""

from __future__ import annotations

from steepest.lab.race.text import plural
from steepest.lab.shared.table import Table
from steepest.lab.suite import protocol
from steepest.lab.suite.running import Stage
from steepest.lab.suite.scores import Score, scores
from steepest.lab.suite.suite import COLUMNS, Cell, Column, Suite

TITLES: dict[Column, str] = {"tuned": "Tuned on each workload", "one_setting": "One setting for all workloads"}


def main_table(suite: Suite, column: Column) -> Table:
    """Return a row for each contender: means, and its steps on each workload."""
    head = ["contender", "steps", "time", "worst", "over", *(task.name.replace("(", "\n(") for task in suite.tasks)]
    return Table(head, [_row(suite, score) for score in scores(suite, column)])


def _row(suite: Suite, score: Score) -> list[str]:
    cells = {cell.task.name: cell for cell in score.cells}
    over = f"{score.compared}/{len(suite.tasks)}"
    means = [ratio(score.steps), ratio(score.time), ratio(score.worst), over]
    return [score.label, *means, *(cell_text(cells.get(task.name)) for task in suite.tasks)]


def cell_text(cell: Cell | None) -> str:
    """Return the steps of a cell, with ``~`` where the final loss is no different, and ``*`` at an edge."""
    if cell is None or cell.steps is None:
        return "–"
    same = "" if cell.significant or cell.is_baseline else "~"
    return f"{cell.steps.bound}{same}{cell.steps.value:.2f}{'*' if cell.edges else ''}"


def ratio(value: float | None) -> str:
    """Return a ratio with two digits after the point.

    >>> ratio(0.6214), ratio(None)
    ('0.62', '–')
    """
    return "–" if value is None else f"{value:.2f}"


def notes(suite: Suite, left_out: list[Stage]) -> list[str]:
    """Return what a reader must know."""
    base = suite.baseline.label
    lines = [
        f"Steps and time to {base}'s final loss, divided by {base}'s; less is better. Means are geometric.",
        f"Everybody had {protocol.TRIALS} trials per workload; final losses are means over "
        f"{plural(protocol.SEEDS, 'seed')}.",
    ]
    cells = [cell for column in COLUMNS for score in scores(suite, column) for cell in score.cells]
    if any(not cell.significant and not cell.is_baseline for cell in cells):
        lines.append("~ the final losses of both after all steps are no further apart than luck puts them.")
    if any(cell.steps and cell.steps.bound for cell in cells):
        lines.append("≤ the shortest runs reach it already; ≥ the longest runs, of twice the steps, do not reach it.")
    if any(cell.edges for cell in cells):
        lines.append("* the best setting is at the edge of what was tried: a better one may lie beyond.")
    for (label, task), reason in suite.refused.items():
        lines.append(f"{label} can't train {task}: {reason}.")
    if failures := [row for row in suite.log if row.failure]:
        first = failures[0]
        lines.append(
            f"{plural(len(failures), 'run')} failed, such as {first.optimizer} on {first.workload}: {first.failure}"
        )
    if left_out:
        names = ", ".join(f"{contender.label} ({TITLES[column].lower()})" for contender, column in left_out)
        lines.append(f"The budget left out: {names}.")
    return lines
