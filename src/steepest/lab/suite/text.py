"""The words of the suite, made from its results as its JSON file holds them: tables, marks and notes.

Results hold the contender's steps and time divided by the baseline's, of which less is better. People read the inverse,
speed-ups, of which more is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from steepest.lab.race.text import plural
from steepest.lab.shared.table import Table

Results = Mapping[str, Any]
TITLES = {"tuned": "Tuned on each workload", "one_setting": "One setting for all workloads"}
"""The two tables, by the names that results have for them."""
MEANS = ["speed-up\nin steps", "speed-up\nin time", "worst\nin steps", "over\nworkloads"]
"""The columns of means."""
OTHER_WAY = {"": "", "≤": "≥", "≥": "≤"}


def speed_up(ratio: float | None, bound: str = "") -> str:
    """Return the inverse of a ratio of steps or times, with two digits after the point; its bound is inverted, too.

    >>> speed_up(0.5), speed_up(2.0, "≥"), speed_up(None)
    ('2.00', '≤0.50', '–')
    """
    return "–" if ratio is None else f"{OTHER_WAY[bound]}{1 / ratio:.2f}"


def verdict(results: Results, column: str, optimizer: str, workload: str) -> str:
    """Return whether a final loss is "better" or "worse" than the baseline's by more than luck, or the "same"."""
    cell = results["cells"][column][optimizer][workload]
    if not cell["significant"]:
        return "same"
    base = results["cells"][column][results["protocol"]["baseline"]][workload]["final"]
    return "worse" if cell["final"] is None or (base is not None and cell["final"] > base) else "better"


def cell_text(results: Results, column: str, optimizer: str, workload: str) -> str:
    """Return a cell's speed-up in steps, with ``~`` where losses are as good as equal, ``*`` at edges."""
    cell = results["cells"][column][optimizer].get(workload)
    if cell is None:
        return "–"
    same = optimizer != results["protocol"]["baseline"] and not cell["significant"]
    return f"{'~' if same else ''}{speed_up(cell['steps'], cell['bound'])}{'*' if 'lr' in cell['edges'] else ''}"


def means(results: Results, column: str) -> Table:
    """Return a row for each contender with its geometric means."""
    head = ["contender", *MEANS]
    return Table(head, [[label, *_means(results, row)] for label, row in results["summary"][column].items()])


def by_workload(results: Results, column: str) -> Table:
    """Return a row for each contender with its steps on each workload."""
    names = [workload["name"] for workload in results["workloads"]]
    rows = [
        [label, *(cell_text(results, column, label, name) for name in names)] for label in results["summary"][column]
    ]
    return Table(["", *names], rows)


def _means(results: Results, row: Mapping[str, Any]) -> list[str]:
    over = f"{row['workloads']} of {len(results['workloads'])}"
    return [speed_up(row["steps"]), speed_up(row["time"]), speed_up(row["worst"]), over]


def stage(results: Results, optimizer: str, column: str) -> str:
    """Return what a contender has reached in a column, in one line."""
    steps, time, worst, over = _means(results, results["summary"][column][optimizer])
    return f"{TITLES[column].lower()}: speed-up {steps} in steps, {time} in time, {worst} at worst, over {over}"


def headline(results: Results) -> str:
    """Return the results in one sentence."""
    base, table = results["protocol"]["baseline"], results["summary"]["tuned"]
    count = len(results["workloads"])
    complete = {label: row for label, row in table.items() if row["workloads"] == count and label != base}
    if not complete:
        return f"No optimizer beside {base} is complete yet."
    best = min(complete, key=lambda label: complete[label]["steps"])
    if complete[best]["steps"] >= 1:
        return f"No optimizer needs fewer steps than {base}, in the geometric mean over {plural(count, 'workload')}."
    steps, time = speed_up(complete[best]["steps"]), speed_up(complete[best]["time"])
    return (
        f"{best} reaches {base}'s final loss {steps} times as fast in steps and {time} times as fast in time, "
        f"in the geometric mean over {plural(count, 'workload')}."
    )


def explanation(base: str) -> str:
    """Return what a speed-up is."""
    return (
        f"Speed-up: {base}'s steps to its final loss, divided by the contender's steps to the same loss; or so for the "
        "time of model and optimizer. More is better."
    )


def notes(results: Results) -> list[str]:
    """Return what a reader must know."""
    base, protocol = results["protocol"]["baseline"], results["protocol"]
    cells = list(_cells(results))
    lines = [
        f"{explanation(base)} Each length is a run of its own, whose learning rate comes down to its end. Means over "
        "workloads are geometric.",
        f"Everybody had {plural(protocol['trials'], 'trial')} on each workload. Final losses are means over "
        f"{plural(protocol['seeds'], 'seed')}.",
    ]
    if any(optimizer != base and not cell["significant"] for optimizer, cell in cells):
        lines.append("~ after the same steps both losses are no further apart than luck may put them.")
    if any(cell["bound"] for _, cell in cells):
        lines.append(
            "≥ the shortest runs reach the loss already, ≤ not even runs of twice the length do; means count the bound."
        )
    if any("lr" in cell["edges"] for _, cell in cells):
        lines.append("* the best learning rate is at the edge of what was tried: a better one may lie beyond.")
    if others := sum("elementwise" in cell["edges"] for _, cell in cells):
        lines.append(
            f"In {plural(others, 'cell')} the best rate of other parameters than hidden matrices, of which three were "
            "tried, is the lowest or highest."
        )
    lines += [f"{row['optimizer']} does not train {row['workload']}: {row['reason']}." for row in results["refused"]]
    if failures := results["failures"]:
        first = failures[0]
        where = f"{first['optimizer']} on {first['workload']}: {first['reason']}"
        lines.append(f"{plural(len(failures), 'run')} failed and counts as diverged, such as {where}")
    if left_out := [f"{row['optimizer']} ({TITLES[row['column']].lower()})" for row in results["left_out"]]:
        lines.append(f"The budget left out: {', '.join(left_out)}.")
    return lines


def _cells(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the contender and the content of each cell."""
    for table in results["cells"].values():
        for optimizer, row in table.items():
            for cell in row.values():
                yield optimizer, cell
