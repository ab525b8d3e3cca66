"""Which parameters take part in a step, where several ranks hold them: agreed before anything has changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress

import torch
from torch import Tensor

from steepest.engine.lost import safe_norm
from steepest.engine.roster import Roster
from steepest.exchange.bucket import Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import local, local_gradient
from steepest.stack.stack import state_dtype


def agree(
    roster: Roster, raising: Collection[int], grads: list[Tensor | None], marks: Sequence[set[int]]
) -> dict[Peers, int]:
    """Agree with other ranks on the parameters that take part in a step: those with a gradient on every rank.

    Args:
        roster: all parameters.
        raising: the numbers of the groups with ``nonfinite="raise"``.
        grads: this rank's gradients; they become local shards, and None where another rank has none.
        marks: sets of numbers of parameters; those of other ranks are added.

    Returns:
        For each set of peers, the number of updates that the other ranks have skipped.

    Raises:
        FloatingPointError: on all ranks, for a gradient of these groups that is not finite on one.
    """
    refused = _not_finite(roster, grads, raising) if raising else set()
    elsewhere = _with_others(roster, grads, refused, marks) if roster.distributed else {}
    if refused:
        index = min(refused)
        raise FloatingPointError(
            f"the gradient of {roster.names[index]} (shape {list(roster.params[index].shape)}) is not finite or "
            'too large to square; nonfinite="skip" would leave the parameter out of this step'
        )
    return elsewhere


def _not_finite(roster: Roster, grads: Tensors, numbers: Collection[int]) -> set[int]:
    """Return the parameters of some groups whose gradient is not finite or too large to square; asking waits."""
    found = set()
    for index, (number, grad) in enumerate(zip(roster.numbers, grads, strict=True)):
        if number in numbers and grad is not None:
            dtype = state_dtype(roster.params[index])
            if not bool(torch.linalg.vector_norm(local(grad).to(dtype)) < safe_norm(dtype)):
                found.add(index)
    return found


def _with_others(
    roster: Roster, grads: list[Tensor | None], refused: set[int], marks: Sequence[set[int]]
) -> dict[Peers, int]:
    """Do so with the ranks that hold parameters too; other ranks' numbers are added to ``refused`` and ``marks``."""
    shared: dict[Peers, list[int]] = {}
    absent: set[int] = set()
    for index, (p, grad) in enumerate(zip(roster.params, grads, strict=True)):
        holds_nothing = p.numel() and not local(p).numel()
        if grad is None and not holds_nothing:
            absent.add(index)
        if p in roster.peers:
            shared.setdefault(roster.peers[p], []).append(index)
    elsewhere = {}
    for ranks, indices in shared.items():
        buckets = [bucket for bucket in roster.buckets if bucket.peers == ranks and bucket.counts]
        mine = sum(stack.skipped for bucket in buckets for stack in bucket.stacks)
        sets = (absent, refused, *marks)
        agreed, everyone = ranks.agree([index in marked for marked in sets for index in indices], mine)
        for k, marked in enumerate(sets):
            marked |= set(compress(indices, agreed[k * len(indices) :]))
        elsewhere[ranks] = everyone - mine
    if not refused:  # making a gradient local may communicate, which only ranks that go on may do
        grads[:] = [None if index in absent else local_gradient(p) for index, p in enumerate(roster.params)]
    return elsewhere
