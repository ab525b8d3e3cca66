"""The table and the notes of ``steepest coord-check``."""

from __future__ import annotations

from collections.abc import Sequence

from steepest.lab.coordcheck.sizes import SIZES, STEADY, Growth
from steepest.lab.shared.table import Table

NOTE = (
    "Of each layer after {steps} steps at a constant rate: its value at width {width}, and the power of the width by "
    "which it grows. update: root mean square of how far the weights have moved, divided by that of the weights. "
    "change: what this move does to the layer's outputs, divided by its inputs. size: of the outputs. Changes and "
    f"sizes should stay as they are: ! marks powers beyond ±{STEADY:g}. Updates may shrink, to a power of -0.5."
)


def table(found: Sequence[Growth]) -> Table:
    """Return a line for each layer: the first width's value and the exponent of each size."""
    head, rows = [""], []
    for what in SIZES:
        head += [what, "power"]
    for one in found:
        row, first = [one.layer], next(iter(one.sizes.values()))
        for what in SIZES:
            row += [value(getattr(first, what)), power(one.exponent(what), what in one.flags)]
        rows.append(row)
    return Table(head, rows)


def value(number: float | None) -> str:
    """Format a size with two digits; a dash for None.

    >>> value(0.01234), value(12.3), value(1.2e-7), value(None)
    ('0.012', '12', '1.2e-07', '–')
    """
    return "–" if number is None else f"{number:.2g}"


def power(exponent: float | None, flagged: bool) -> str:
    """Format an exponent, with a mark if it is flagged; a dash for None.

    >>> power(0.5, True), power(-0.004, False), power(None, False)
    ('+0.50!', '0.00 ', '– ')
    """
    if exponent is None:
        return "– "
    rounded = round(exponent, 2) + 0.0
    return (f"{rounded:+.2f}" if rounded else "0.00") + ("!" if flagged else " ")


def verdict(found: Sequence[Growth]) -> str:
    """Say how many layers move with the width, and name the one that moves most."""
    moving = [one for one in found if one.flags]
    if not moving:
        return f"No layer's change or size moves with the width by more than a power of {STEADY:g}."
    worst = max(moving, key=lambda one: max(map(abs, one.flags.values())))
    what, exponent = max(worst.flags.items(), key=lambda item: abs(item[1]))
    return (
        f"{len(moving)} of {len(found)} layers move with the width; most of all the {what} of {worst.layer}, like "
        f"width^{exponent:.2f}."
    )
