"""The tables and notes of ``steepest plan``, and its numbers with prefixes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steepest.lab.plan.plan import Outlook
from steepest.lab.shared.table import Table

NOTE = (
    "Of a step, by rank. state: bytes of optimizer state on the rank that has most, then on the average, then what of "
    "it belongs to no matrix. in: bytes of gradients that a rank sends to owners; out: bytes of directions (float32) "
    "that an owner sends back; at most. FLOPs: of the optimizer on the busiest rank, refreshes on the average. "
    "balance: that by the mean. share: that by the model's own, 6 per parameter and token. "
    "Simulated: nothing was sent or timed."
)
BLOCKS_NOTE = " Blocks change the optimizer: each is preconditioned by itself."
TIMES_NOTE = (
    "Predicted for {device}: FLOPs by kind, each at {speeds}, then bytes at its bandwidth, one after the other, on the "
    "rank that has most. step: the optimizer's, on the average; at once: of the longest, if all refresh in it; "
    "in turn: if they are staggered; first: of the one in which all have their first refresh. model: forward and "
    "backward on a rank, 6 FLOPs per parameter and token at {mfu:.0%} of its peak. share: of a training step. held: "
    "bytes of weights, gradients and state. Left out: what travels, and activations."
)
GUESSED, MEASURED = "a share of its published peak that is assumed", "the speed measured for it"


def shares(found: Sequence[Outlook]) -> Table:
    """Return what ranks hold, send and compute: a line for each model and block size."""
    head = ["", "blocks", "matrices", "state\nB", "mean\nB", "rest\nB", "in\nB", "out\nB", "FLOPs", "balance", "share"]
    lines = []
    for one in found:
        amounts = (one.state_max, one.state_mean, one.elementwise_max, one.sent_in_max, one.sent_out_max, one.flops_max)
        ratios = (f"{one.balance:.2f}", f"{one.share:.1%}")
        lines.append([one.model, str(one.block_size or "–"), str(one.matrices), *map(amount, amounts), *ratios])
    return Table(head, lines)


def times(found: Sequence[Outlook]) -> Table:
    """Return the predicted times: a line for each model and block size."""
    columns = ("step\nms", "at once\nms", "in turn\nms", "first\nms", "model\nms")
    head = ["", "blocks", *columns, "share", "held\nB", "of\nB", "fits"]
    lines = []
    for one in found:
        if (seen := one.forecast) is not None:
            kinds = (seen.step, seen.worst, seen.staggered, seen.first, seen.training)
            steps = (milliseconds(1e3 * s) for s in kinds)
            room = (amount(seen.held), amount(seen.memory), "yes" if seen.fits else "no")
            lines.append([one.model, str(one.block_size or "–"), *steps, f"{seen.share:.1%}", *room])
    return Table(head, lines)


def verdict(found: Sequence[Outlook]) -> str:
    """Say in one sentence whether weights, gradients and state fit into the device's memory."""
    seen = {f"{one.model}{f' in blocks of {one.block_size}' * bool(one.block_size)}": one.forecast for one in found}
    rooms = {name: forecast for name, forecast in seen.items() if forecast is not None}
    if not rooms:
        return "Whether that fits depends on the device: name it, as in --gpu h100."
    too_large = {name: forecast.held for name, forecast in rooms.items() if not forecast.fits}
    memory = f"the {size(next(iter(rooms.values())).memory)} of a device"
    if not too_large:
        most = size(max(forecast.held for forecast in rooms.values()))
        return f"It fits: weights, gradients and state take at most {most} of {memory}, and activations come on top."
    need = ", ".join(f"{name} needs {size(held)}" for name, held in too_large.items())
    some = "Not all fits" if len(too_large) < len(rooms) else "It does not fit"
    return f"{some} into {memory}: {need}; more ranks (--world), or smaller blocks (--block-size), hold less each."


def milliseconds(value: float | None) -> str:
    """Format a time with three digits or more, and no more than two after the point; empty for None.

    >>> milliseconds(12345.6), milliseconds(12.345), milliseconds(0.0123), milliseconds(None)
    ('12,346', '12.3', '0.01', '')
    """
    if value is None:
        return ""
    return f"{value:,.{max(0, min(2, 2 - math.floor(math.log10(value)))) if value > 0 else 2}f}"


def amount(value: float) -> str:
    """Format a number with three digits and a prefix, in steps of a thousand.

    >>> amount(1.234e9), amount(96), amount(5.6e14), amount(0)
    ('1.23G', '96', '560T', '0')
    """
    prefixes = ("", "k", "M", "G", "T", "P")
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.0f}" if value >= 99.5 or power == 0 else f"{value:#.3g}"
    return digits + prefixes[power]


def size(count: float) -> str:
    """Format a number of bytes.

    >>> size(6.25e9), size(96)
    ('6.25 GB', '96 B')
    """
    number = amount(count)
    digits = number.rstrip("kMGTP")
    return f"{digits} {number.removeprefix(digits)}B"
