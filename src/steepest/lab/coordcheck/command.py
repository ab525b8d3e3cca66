"""The command ``steepest coord-check``: it trains a model at several widths for some steps, and prints what grows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console

from steepest.lab.coordcheck import text
from steepest.lab.coordcheck.families import family
from steepest.lab.coordcheck.sizes import SIZES, Growth, Sizes, growth, sizes
from steepest.lab.shared.contenders import Contender, parse_contenders
from steepest.lab.shared.device import one_thread
from steepest.lab.shared.errors import BadInput, one_line


@dataclass(frozen=True)
class Request:
    """The options of the command line."""

    model: str = "stdlib"
    optimizer: str = "adamw"
    widths: str = "32,64,128,256"
    steps: int = 5
    seed: int = 0


def run(request: Request, console: Console, as_json: bool = False) -> None:
    """Train at each width, and print the table, or all figures as JSON.

    Raises:
        BadInput: for a model, an optimizer or widths that can't be checked.
    """
    (contender, *others) = parse_contenders(request.optimizer)
    if others:
        raise BadInput(f"--optimizer {request.optimizer}: give one")
    found = check(request, contender)
    if as_json:
        console.print_json(json.dumps([_facts(one) for one in found]))
        return
    widths = list(found[0].sizes)
    console.print(f"{request.model}, widths {', '.join(map(str, widths))}: {contender}", markup=False, highlight=False)
    console.print()
    console.print(text.table(found).for_console(gap=0))
    console.print("\n" + text.NOTE.format(steps=request.steps, width=widths[0]), style="dim", highlight=False)
    console.print("\n" + text.verdict(found), markup=False, highlight=False)


def check(request: Request, contender: Contender) -> list[Growth]:
    """Return each layer's sizes at all widths.

    Raises:
        BadInput: as `run` does.
    """
    of = family(request.model)
    found: dict[int, dict[str, Sizes]] = {}
    parameters = set()
    with one_thread():
        for width in parse_widths(request.widths):
            workload = of(width)
            probe = workload.model()
            contender.check(probe)
            parameters.add(sum(p.numel() for p in probe.parameters()))
            try:
                found[width] = sizes(workload, contender, request.steps, request.seed)
            except (BadInput, RuntimeError, ValueError, TypeError) as error:
                raise BadInput(f"{request.model} at width {width}: {_reason(error)}") from error
    if len(parameters) < len(found):
        raise BadInput(
            f"{request.model}: models of different widths have equally many parameters; make layers as wide as asked"
        )
    return growth(found)


def parse_widths(given: str) -> list[int]:
    """Return the widths in rising order.

    Raises:
        BadInput: unless these are at least two positive integers.

    >>> parse_widths("64, 32,128")
    [32, 64, 128]
    """
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(map(int, parts))) < 2:
        raise BadInput(f"--widths {given}: must be at least two different positive integers, as in 32,64,128")
    return sorted(set(map(int, parts)))


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, BadInput) else one_line(error)


def _facts(one: Growth) -> dict[str, object]:
    return {
        "layer": one.layer,
        "sizes": {str(width): asdict(sizes) for width, sizes in one.sizes.items()},
        "powers": {what: one.exponent(what) for what in SIZES},
        "flags": sorted(one.flags),
    }
