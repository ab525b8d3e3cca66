"""``steepest bench --count``: launches, bytes and FLOPs of steps on a GPU that isn't there, by phase or by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape

from steepest.engine.phases import PHASES, REST
from steepest.lab.bench.entrants import Entrant
from steepest.lab.bench.fake_gpu import Counted, Steps, count_steps
from steepest.lab.bench.shapes import ShapeSet
from steepest.lab.shared.table import Table

NOTE = (
    "Launches, bytes per entry of the weights (each tensor of an operation once), and FLOPs in billions. first: the "
    "first step; most and least: the steps with the most and the least bytes of the period after it. Triton's kernels "
    "are off. Counts are no times."
)


def show(shapes: ShapeSet, entrants: Sequence[Entrant], lines: bool, console: Console) -> None:
    """Count the steps of each entrant on a fake GPU, and print a table for each."""
    console.print(f"\n[bold]{escape(str(shapes))}[/]", highlight=False)
    for entrant in entrants:
        steps = count_steps(entrant.make, shapes.matrices, max(2, entrant.family.frequency))
        console.print(f"\n[bold]{escape(entrant.label)}[/]", highlight=False)
        console.print((by_line if lines else by_phase)(steps, shapes.entries).for_console(gap=0))
        for name, step in vars(steps).items():
            if step.waits:
                console.print(
                    f"{name}: the host waits for {escape(', '.join(dict.fromkeys(step.waits)))}", highlight=False
                )
    console.print(NOTE, style="dim", highlight=False)


def by_phase(steps: Steps, entries: int) -> Table:
    """Return the table of the steps' phases."""
    parts = {name: step.by(lambda one: one.phase) for name, step in vars(steps).items()}
    rows = [
        [phase, *(cell for of_step in parts.values() for cell in _cells(of_step.get(phase, Counted()), entries))]
        for phase in (*PHASES, REST)
        if any(phase in of_step for of_step in parts.values())
    ]
    whole = ["all", *(cell for step in vars(steps).values() for cell in _cells(step, entries))]
    return Table(["", *(f"{name}\n{unit}" for name in parts for unit in ("launches", "B/el", "GFLOP"))], [*rows, whole])


def by_line(steps: Steps, entries: int) -> Table:
    """Return the table of the operations of the step with the least bytes, by line of this library."""
    parts = steps.least.by(lambda one: f"{one.line} {one.name}")
    return Table(["", "launches", "B/el", "GFLOP"], [[name, *_cells(part, entries)] for name, part in parts.items()])


def _cells(counted: Counted, entries: int) -> Iterator[str]:
    yield str(counted.launches)
    yield f"{counted.bytes / entries:.1f}"
    yield f"{counted.flops / 1e9:.0f}"
