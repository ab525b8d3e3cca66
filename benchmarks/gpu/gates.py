"""From which sizes on kernels pay: `gates.measure_gates` as far as the time goes, and the gates that follow."""

from __future__ import annotations

from dataclasses import asdict

import torch
from gates import Figure, in_turn, measure_blocks, measure_gates, suggest

from gpu.record import Record, Unavailable
from steepest.kernels import available, use
from steepest.stack.undo import undoing


def run(record: Record) -> None:
    """Time kernels against twins by size; on a CPU without kernels, blocks of products against whole products."""
    with use("always"):
        runs = available(torch.zeros(1, device=record.device))
    if not runs:
        if record.cuda:
            raise Unavailable("kernels don't run here: is Triton installed, and STEEPEST_KERNELS not 'never'?")
        ratios = measure_blocks(((1, 24, 48),) if record.tiny else ((1, 768, 768),), repeats=3)
        record.figures["blocks over whole products"] = {str(shape): ratio for shape, ratio in ratios.items()}
        record.left_out.append("kernels: they need CUDA")
        return
    x = torch.randn((2, 40, 40) if record.tiny else (12, 3072, 768), device=record.device)
    finite = torch.ones(x.shape[0], dtype=torch.bool, device=record.device)
    kernel, twin = in_turn(lambda: undoing(finite, [x])(), record.device, repeats=5)
    record.figures["undoing nothing, ms"] = {"kernel": kernel, "twin": twin}
    found: list[Figure] = []
    spent: dict[int, float] = {}
    for size in (64,) if record.tiny else (512, 1024, 2048, 4096, 8192):
        for batch in (1, 4):
            expected = (3.0 if size > 4096 else 1.3) * spent.get(batch, 0.0)  # compiling takes most of the time
            if record.fits(f"gates at {batch} of {size}", expected):
                start = record.clock()
                found += measure_gates(record.device, sizes=(size,), batches=(batch,), repeats=5)
                spent[batch] = record.clock() - start
                record.figures["kernels by twins"] = [asdict(one) | {"ratio": one.ratio} for one in found]
                record.figures["suggested"] = asdict(suggest(found))
                record.write()
