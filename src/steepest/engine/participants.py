"""Which parameters take part in a step, where several ranks hold them: agreed before anything has changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor

from steepest.engine.roster import Roster
from steepest.engine.step import safe_norm
from steepest.exchange.bucket import Bucket, Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import local, local_gradient
from steepest.stack.stack import state_dtype


def not_finite(roster: Roster, grads: Tensors, numbers: Collection[int]) -> set[int]:
    """Return the parameters of some groups whose gradient is not finite or too large to square; asking waits."""
    found = set()
    for index, (number, grad) in enumerate(zip(roster.numbers, grads, strict=True)):
        if number in numbers and grad is not None:
            dtype = state_dtype(roster.params[index])
            if not bool(torch.linalg.vector_norm(local(grad).to(dtype)) < safe_norm(dtype)):
                found.add(index)
    return found


def agree(
    params: Sequence[Tensor],
    grads: list[Tensor | None],
    refused: set[int],
    peers: Mapping[Tensor, Peers],
    buckets: Iterable[Bucket],
    marks: Sequence[set[int]] = (),
) -> dict[Peers, int]:
    """Agree with other ranks on the parameters that take part in a step, and on the gradients that are refused.

    A parameter takes part if every rank that holds something of it has a gradient for it.

    Args:
        params: the parameters of all groups.
        grads: this rank's gradients; they become local shards, and None where another rank has none.
        refused: numbers of parameters whose gradients this rank refuses; others' are added.
        peers: the ranks that hold shards of each parameter, where other ranks do.
        buckets: all buckets, whose skipped updates are counted.
        marks: further sets of numbers of parameters; others' are added.

    Returns:
        For each set of peers, the number of updates that the other ranks have skipped.
    """
    shared: dict[Peers, list[int]] = {}
    absent: set[int] = set()
    for index, (p, grad) in enumerate(zip(params, grads, strict=True)):
        holds_nothing = p.numel() and not local(p).numel()
        if grad is None and not holds_nothing:
            absent.add(index)
        if p in peers:
            shared.setdefault(peers[p], []).append(index)
    elsewhere = {}
    for ranks, indices in shared.items():
        mine = sum(s.skipped for bucket in buckets if bucket.peers == ranks and bucket.counts for s in bucket.stacks)
        sets = (absent, refused, *marks)
        agreed, everyone = ranks.agree([index in marked for marked in sets for index in indices], mine)
        for k, marked in enumerate(sets):
            marked |= set(compress(indices, agreed[k * len(indices) :]))
        elsewhere[ranks] = everyone - mine
    if not refused:  # making a gradient local may communicate, which only ranks that go on may do
        grads[:] = [None if index in absent else local_gradient(p) for index, p in enumerate(params)]
    return elsewhere
