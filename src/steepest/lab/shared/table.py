"""Tables of text that the console and the reports show alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import rich.table
from rich import box
from rich.markup import escape


class Table(NamedTuple):
    """A head and rows of cells; the first ``labels`` columns name the row, the others hold numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1

    def records(self) -> list[dict[str, str]]:
        r"""Return each row as a dictionary from column titles to cells.

        >>> Table(["step", "N = 1\nafter"], [["51", "0.00"]]).records()
        [{'step': '51', 'N = 1 after': '0.00'}]
        """
        titles = [title.replace("\n", " ") for title in self.head]
        return [dict(zip(titles, row, strict=True)) for row in self.rows]

    def transposed(self) -> Table:
        """Return the table with rows for columns.

        >>> Table(["", "a", "b"], [["x", "1", "2"]]).transposed()
        Table(head=['', 'x'], rows=[['a', '1'], ['b', '2']], labels=1)
        """
        head, *rows = map(list, zip(self.head, *self.rows, strict=True))
        return Table(head, rows)

    def for_console(self, gap: int = 1, bold_first: bool = False) -> rich.table.Table:
        """Return the table for rich's console, with ``gap`` spaces more than one between columns; labels are folded."""
        shown = rich.table.Table(
            box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
        )
        for i, title in enumerate(self.head):
            label = i < self.labels
            shown.add_column(
                title, justify="left" if label else "right", no_wrap=not label, overflow="fold", vertical="bottom"
            )
        for i, row in enumerate(self.rows):
            shown.add_row(*map(escape, row), style="bold" if bold_first and i == 0 else "")
        return shown
