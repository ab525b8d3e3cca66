"""What was taken over, and what was not, as a table to print."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

TITLES = ("parameter", "rule", "taken over", "starts fresh")
WIDTH, NARROWEST = 100, 30
"""Characters of a printed line, and of its last column at least."""


@dataclass(frozen=True)
class Row:
    """A row tells which entries of one parameter's state were taken over, and which start fresh."""

    name: str
    rule: str
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    """These are as they were: before the first step, as a new optimizer has them."""
    why: str
    """Why some start fresh; empty if none does."""


@dataclass(frozen=True)
class Adoption:
    """An adoption tells what was taken over from another optimizer. Print it."""

    rows: tuple[Row, ...]
    options: tuple[str, ...]
    """Options of groups that are others than the state was saved under. They were not changed."""
    left: tuple[str, ...]
    """Names of saved parameters that are none here."""

    def __str__(self) -> str:
        lines = [TITLES, *map(_cells, self.rows)]
        *widths, _ = [max(map(len, column)) for column in zip(*lines, strict=True)]
        indent = sum(widths) + 2 * len(widths)
        text = []
        for *cells, last in lines:
            start = "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=True))
            first, *rest = textwrap.wrap(last, max(WIDTH - indent, NARROWEST)) or [""]
            text += [(start + first).rstrip(), *(" " * indent + more for more in rest)]
        left = [f"saved, and not here: {', '.join(self.left)}"] if self.left else []
        return "\n".join([*text, *self.options, *left])


def _cells(row: Row) -> tuple[str, ...]:
    fresh = ", ".join(row.fresh) if row.taken else "all"
    return row.name, row.rule, ", ".join(row.taken), f"{fresh}: {row.why}" if row.fresh else ""
