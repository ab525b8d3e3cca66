"""Which parameters take part in a step, where several ranks hold them: agreed before anything has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from steepest.exchange.bucket import Bucket
from steepest.exchange.peers import Peers
from steepest.exchange.shards import local, local_gradient

Gradients = list[list[Tensor | None]]
"""By group and position, the gradient of each parameter; None if the parameter takes no part in the step."""


def agree(
    groups: Sequence[Mapping[str, Any]],
    grads: Gradients,
    refused: set[tuple[int, int]],
    peers: Mapping[Tensor, Peers],
    buckets: Iterable[Bucket],
) -> dict[Peers, int]:
    """Agree with other ranks on the parameters that take part in a step, and on the gradients that are refused.

    A parameter takes part if every rank that holds something of it has a gradient for it.

    Args:
        groups: parameters and options.
        grads: this rank's gradients; they become local shards, and None where another rank has none.
        refused: groups and positions of gradients that this rank refuses; others' are added.
        peers: the ranks that hold shards of each parameter, where other ranks do.
        buckets: all buckets, whose skipped updates are counted.

    Returns:
        For each set of peers, the number of updates that the other ranks have skipped.
    """
    shared: dict[Peers, list[tuple[int, int]]] = {}
    absent: set[tuple[int, int]] = set()
    for number, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            holds_nothing = p.numel() and not local(p).numel()
            if grads[number][i] is None and not holds_nothing:
                absent.add((number, i))
            if p in peers:
                shared.setdefault(peers[p], []).append((number, i))
    elsewhere = {}
    for ranks, positions in shared.items():
        mine = sum(s.skipped for bucket in buckets if bucket.peers == ranks and bucket.counts for s in bucket.stacks)
        flags = [at in absent for at in positions] + [at in refused for at in positions]
        agreed, everyone = ranks.agree(flags, mine)
        absent |= {at for at, flag in zip(positions, agreed[: len(positions)], strict=True) if flag}
        refused |= {at for at, flag in zip(positions, agreed[len(positions) :], strict=True) if flag}
        elsewhere[ranks] = everyone - mine
    if not refused:  # making a gradient local may communicate, which only ranks that go on may do
        for number, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                grads[number][i] = None if (number, i) in absent else local_gradient(p)
    return elsewhere
