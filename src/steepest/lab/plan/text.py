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
    "rank that has most. ms: of the optimizer's step on the average; at once: of the longest, if all refresh in it; "
    "in turn: if they are staggered. model: forward and backward on a rank, 6 FLOPs per parameter and token at "
    "{mfu:.0%} of its peak. share: of a training step. held: bytes of weights, gradients and state. Left out: what "
    "travels, and activations."
)
GUESSED, MEASURED = "a share of its published peak that is assumed", "the speed measured for it"


def shares(found: Sequence[Outlook]) -> Table:
    """Return what ranks hold, send and compute: a line for each model and block size."""
    head = ["", "blocks", "matrices", "state", "mean", "rest", "in", "out", "FLOPs", "balance", "share"]
    lines = []
    for one in found:
        amounts = (one.state_max, one.state_mean, one.elementwise_max, one.sent_in_max, one.sent_out_max, one.flops_max)
        ratios = (f"{one.balance:.2f}", f"{one.share:.1%}")
        lines.append([one.model, str(one.block_size or "–"), str(one.matrices), *map(amount, amounts), *ratios])
    return Table(head, lines)


def times(found: Sequence[Outlook]) -> Table:
    """Return the predicted times: a line for each model and block size."""
    head = ["", "blocks", "ms", "at once", "in turn", "model", "share", "held", "of", "fits"]
    lines = []
    for one in found:
        if (seen := one.forecast) is not None:
            steps = (milliseconds(1e3 * s) for s in (seen.step, seen.worst, seen.staggered, seen.training))
            room = (amount(seen.held), amount(seen.memory), "yes" if seen.fits else "no")
            lines.append([one.model, str(one.block_size or "–"), *steps, f"{seen.share:.1%}", *room])
    return Table(head, lines)


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
