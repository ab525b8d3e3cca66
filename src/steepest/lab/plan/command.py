"""The command ``steepest plan``: it simulates a step on many ranks, and prints tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from steepest.lab.listing.check import DTYPES
from steepest.lab.plan import text
from steepest.lab.plan.devices import gpu
from steepest.lab.plan.here import NAME, here
from steepest.lab.plan.models import PRESETS, Model, from_file, preset
from steepest.lab.plan.plan import Outlook, look, mesh
from steepest.lab.plan.time import MFU
from steepest.lab.shared.errors import BadInput, one_line

BLOCKS = (8192, 4096, 2048)
"""The block sizes that are tried besides whole matrices."""


@dataclass(frozen=True)
class Request:
    """The options of the command line."""

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
    """The dtype of gradients; None: that of the file's parameters, bfloat16 for published models."""
    gpu: str | None = None
    """A name in `steepest.lab.plan.devices.GPUS`, or "here"; None: no time is predicted."""
    mfu: float = MFU


def run(request: Request, console: Console, as_json: bool = False) -> None:
    """Plan the step, and print the tables.

    Raises:
        BadInput: for a request that can't be planned.
    """
    found = list(outlooks(request))
    if as_json:
        console.print_json(json.dumps([_facts(one) for one in found]))
        return
    title = f"{request.optimizer} on {request.world} ranks, {request.layout}, {request.tokens:,} tokens a step"
    console.print(title, markup=False)
    console.print()
    console.print(text.shares(found).for_console(gap=0))
    console.print("\n" + text.NOTE + text.BLOCKS_NOTE * any(one.block_size for one in found), style="dim")
    if request.gpu is not None:
        device = request.gpu.lower()
        speeds = text.MEASURED if device == NAME else text.GUESSED
        console.print()
        console.print(text.times(found).for_console(gap=0))
        console.print("\n" + text.TIMES_NOTE.format(device=device, speeds=speeds, mfu=request.mfu), style="dim")
    console.print()
    console.print(text.verdict(found), highlight=False)


def outlooks(request: Request) -> Iterator[Outlook]:
    """Yield an outlook for each model and each block size that cuts it differently.

    Raises:
        BadInput: for a request that can't be planned.
    """
    on = mesh(request.layout, request.world)
    if request.tokens < 1:
        raise BadInput(f"--tokens {request.tokens}: must be at least 1")
    if not 0 < request.mfu <= 1:
        raise BadInput(f"--mfu {request.mfu}: must be in (0, 1], a share of the device's peak")
    name = request.gpu and request.gpu.lower()
    known = None if name in (None, NAME) else gpu(name)
    for model in _models(request):
        pieces: list[list[tuple[int, int, int]]] | None = None
        for size in (0, *BLOCKS) if request.block_size is None else (request.block_size,):
            try:
                cut = model.cut(size)
            except ValueError as error:
                raise BadInput(one_line(error)) from error
            before, pieces = pieces, [weight.view.pieces for weight in cut.weights if weight.view]
            if pieces != before:
                yield look(cut, on, request.tokens, device=here(cut) if name == NAME else known, mfu=request.mfu)


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


def _facts(one: Outlook) -> dict[str, Any]:
    facts = asdict(one) | {"balance": one.balance}
    if one.forecast is not None:
        facts["forecast"] |= {"share": one.forecast.share, "fits": one.forecast.fits}
    return facts
