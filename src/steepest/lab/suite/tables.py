"""The suite's tables in Markdown pages, written from its results::

    python -m steepest.lab.suite.tables benchmarks/results/suite.json README.md docs/which-optimizer.md

In a page, ``<!-- suite:begin summary -->`` begins the table of means and ``<!-- suite:begin workloads -->`` those by
workload; ``<!-- suite:end -->`` ends either. What stands between is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from steepest.lab.shared.files import write
from steepest.lab.shared.table import Table
from steepest.lab.suite.text import TITLES, Results, by_workload, means

BEGIN = "<!-- suite:begin"
BLOCK = re.compile(rf"({BEGIN} (\w+) -->\n).*?(<!-- suite:end -->)", re.DOTALL)


def filled(page: str, results: Results) -> str:
    """Return a page with its tables made from the results.

    Raises:
        ValueError: if the page has no place for a table, or for one that there is not.
    """
    kinds = {"summary": summary, "workloads": workloads}
    found = BLOCK.findall(page)
    if not found or len(found) != page.count(BEGIN) or not {kind for _, kind, _ in found} <= kinds.keys():
        raise ValueError(
            f"needs lines '{BEGIN} summary -->' or '{BEGIN} workloads -->', each with '<!-- suite:end -->' below it"
        )
    return BLOCK.sub(lambda block: f"{block[1]}{kinds[block[2]](results)}\n{block[3]}", page)


def summary(results: Results) -> str:
    """Return the means of both tables side by side, ordered as the first."""
    tables = {column: {row[0]: row[1:] for row in means(results, column).rows} for column in TITLES}
    none = ["–"] * 4
    names = list(dict.fromkeys(name for rows in tables.values() for name in rows))
    head = ["optimizer"]
    for words in ("tuned", "one setting"):
        head += [f"{words}: steps", "time", "worst", "over"]
    return markdown(
        Table(head, [[f"`{name}`", *(x for t in tables.values() for x in t.get(name, none))] for name in names])
    )


def workloads(results: Results) -> str:
    """Return both tables by workload, one below the other."""
    parts = []
    for column, title in TITLES.items():
        table = by_workload(results, column)
        rows = [[f"`{label}`", *cells] for label, *cells in table.rows]
        parts.append(f"{title}:\n\n{markdown(Table(['optimizer', *table.head[1:]], rows))}")
    return "\n\n".join(parts)


def markdown(table: Table) -> str:
    """Return a table in Markdown.

    >>> print(markdown(Table(["a", "b"], [["x", "1*"]])))
    | a | b |
    |---|---|
    | x | 1\\* |
    """
    rows = [[cell.replace("*", "\\*").replace("|", "\\|") for cell in row] for row in [table.head, *table.rows]]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(table.head), *lines[1:]])


def main(arguments: list[str]) -> int:
    """Write the tables into pages, and return the exit status."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    results = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    for name in arguments[1:]:
        try:
            page = filled(Path(name).read_text(encoding="utf-8"), results)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        write(Path(name), page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
