"""What ``steepest plan`` prints: a table to read, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from steepest.lab.listing.check import DTYPES
from steepest.lab.plan.devices import gpu
from steepest.lab.plan.here import NAME, here
from steepest.lab.plan.models import PRESETS, Model, from_file, preset
from steepest.lab.plan.plan import Outlook, look, mesh
from steepest.lab.plan.time import MFU
from steepest.lab.shared.errors import BadInput, one_line

BLOCKS = (8192, 4096, 2048)
"""What is looked at beside whole matrices."""
FOOTNOTE = (
    "Of a step, by rank. state: bytes of optimizer state on the rank that has most, then on the average, then what of "
    "it belongs to no matrix. in: bytes of gradients that a rank sends to owners; out: bytes of directions (float32) "
    "that an owner sends back; at most. FLOPs: of the optimizer on the busiest rank, refreshes on the average. "
    "balance: that by the mean. share: that by the model's own, 6 per parameter and token. "
    "Simulated: nothing was sent or timed."
)
TIME_NOTE = (
    "Predicted for {device}: FLOPs by kind, each at {speeds}, then bytes at its bandwidth, one after the other, on the "
    "rank that has most. ms: of the optimizer's step on the average; at once: of the longest, if all refresh in it; "
    "in turn: if they are staggered. model: forward and backward on a rank, 6 FLOPs per parameter and token at "
    "{mfu:.0%} of its peak. share: of a training step. held: bytes of weights, gradients and state. Left out: what "
    "travels, and activations."
)
GUESSED, MEASURED = "a share of its published peak that is assumed", "the speed measured for it"
BLOCKS_NOTE = "Blocks change the optimizer: each is preconditioned by itself."


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    model_file: str | None = None
    params: str | None = None
    """Names in `steepest.lab.plan.models.PRESETS`, separated by commas."""
    optimizer: str = "soap"
    options: Mapping[str, Any] = field(default_factory=dict)
    world: int = 8
    layout: str = "fsdp"
    block_size: int | None = None
    """None: whole matrices, and `BLOCKS`."""
    tokens: int = 2**19
    dtype: str | None = None
    """Of gradients; None: that of the file's parameters, bfloat16 for well-known models."""
    gpu: str | None = None
    """In `steepest.lab.plan.devices.GPUS`, or "here"; None: time is left out."""
    mfu: float = MFU


def run(request: Request, console: Console, as_json: bool = False) -> None:
    """Plan, and print.

    Raises:
        BadInput: for anything that can't be planned.
    """
    found = list(outlooks(request))
    if as_json:
        console.print_json(json.dumps([_facts(one) for one in found]))
        return
    console.print(f"{request.optimizer} on {request.world} ranks, {request.layout}, {request.tokens:,} tokens a step")
    console.print(table(found))
    notes = [FOOTNOTE, BLOCKS_NOTE] if any(one.block_size for one in found) else [FOOTNOTE]
    console.print(" ".join(notes), style="dim")
    if request.gpu is not None:
        speeds = MEASURED if request.gpu.lower() == NAME else GUESSED
        console.print(times(found))
        console.print(TIME_NOTE.format(device=request.gpu.lower(), speeds=speeds, mfu=request.mfu), style="dim")


def outlooks(request: Request) -> Iterator[Outlook]:
    """One for each model and way to cut it.

    Raises:
        BadInput: for anything that can't be planned.
    """
    on = mesh(request.layout, request.world)
    if request.tokens < 1:
        raise BadInput(f"--tokens {request.tokens}: must be at least 1")
    if not 0 < request.mfu <= 1:
        raise BadInput(f"--mfu {request.mfu}: must be in (0, 1], a share of the device's peak")
    name = request.gpu and request.gpu.lower()
    known = None if name in (None, NAME) else gpu(name)
    for model in _models(request):
        sizes = (0, *BLOCKS) if request.block_size is None else (request.block_size,)
        pieces = None
        for size in sizes:
            try:
                cut = model.cut(size)
            except ValueError as error:
                raise BadInput(one_line(error)) from error
            shapes = [weight.view.pieces for weight in cut.weights if weight.view]
            if shapes != pieces:  # there was something to cut
                device = here(cut) if name == NAME else known
                yield look(cut, on, request.tokens, device=device, mfu=request.mfu)
            pieces = shapes


def _models(request: Request) -> Iterator[Model]:
    if request.dtype is not None and request.dtype not in DTYPES:
        raise BadInput(f"--dtype {request.dtype}: there are {', '.join(DTYPES)}")
    itemsize = None if request.dtype is None else DTYPES[request.dtype].itemsize
    if request.model_file is not None:
        if request.params is not None:
            raise BadInput(f"--params {request.params}: give a model file or well-known sizes, not both")
        yield from_file(Path(request.model_file), request.optimizer, request.options, itemsize)
        return
    for name in (request.params or ",".join(PRESETS)).split(","):
        yield preset(name.strip().lower(), request.optimizer, request.options, itemsize or 2)


def table(found: list[Outlook]) -> Table:
    """A line for each, within eighty columns."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    grid.add_column("", overflow="fold")
    for heading in ("blocks", "matrices", "state", "mean", "rest", "in", "out", "FLOPs", "balance", "share"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        amounts = (one.state_max, one.state_mean, one.elementwise_max, one.sent_in_max, one.sent_out_max, one.flops_max)
        ratios = (f"{one.balance:.2f}", f"{one.share:.1%}")
        grid.add_row(one.model, str(one.block_size or "–"), str(one.matrices), *map(amount, amounts), *ratios)
    return grid


def times(found: list[Outlook]) -> Table:
    """What is predicted, a line for each, within eighty columns."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    grid.add_column("", overflow="fold")
    for heading in ("blocks", "ms", "at once", "in turn", "model", "share", "held", "of", "fits"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        if (seen := one.forecast) is None:
            continue
        milliseconds = map(in_ms, (seen.step, seen.worst, seen.staggered, seen.training))
        room = (amount(seen.held), amount(seen.memory), "yes" if seen.fits else "no")
        grid.add_row(one.model, str(one.block_size or "–"), *milliseconds, f"{seen.share:.1%}", *room)
    return grid


def in_ms(seconds: float) -> str:
    """Three digits, or all before the point.

    >>> in_ms(0.00123), in_ms(0.0999), in_ms(12.3456)
    ('1.23', '99.9', '12,346')
    """
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.09995 else f"{1e3 * seconds:#.3g}"


def _facts(one: Outlook) -> dict[str, Any]:
    facts = asdict(one) | {"balance": one.balance}
    if one.forecast is not None:
        facts["forecast"] |= {"share": one.forecast.share, "fits": one.forecast.fits}
    return facts


def amount(value: float) -> str:
    """Three digits and a prefix, in steps of a thousand.

    >>> amount(1.234e9), amount(96), amount(5.6e14), amount(0)
    ('1.23G', '96', '560T', '0')
    """
    prefixes = ("", "k", "M", "G", "T", "P")
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if value >= 99.5 or power == 0 else f"{value:#.3g}"
    return digits + prefixes[power]
