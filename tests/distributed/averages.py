"""Functions that the ranks run in tests of the averaging of statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.exchange.averaging import Averaging, Target
from steepest.exchange.peers import world


def symmetric(seed: int, *shape: int) -> Tensor:
    """Return symmetric matrices that are the same in every process."""
    K = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return K + K.mT


def averaged(heard: list[list[int]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Average the statistics of some jobs, of which each was heard by some ranks; job k is of rank k modulo world.

    Returns the averages of this rank's jobs.
    """
    peers = world()
    targets = [Target((k, 0), k % peers.size, (2, 3, 3), (2, k + 1, k + 1)) for k in range(len(heard))]
    mine = {t.key: statistics(t, peers.me) for t in targets if peers.me in heard[t.key[0]]}
    found = Averaging(peers, targets, mine, torch.empty(0, dtype=torch.float64)).wait()
    return {job: averages for (job, _), averages in found.items()}


def statistics(target: Target, rank: int) -> tuple[Tensor, Tensor]:
    """Return the A and B of a rank."""
    return symmetric(10 * target.key[0] + rank, *target.A), symmetric(1000 + 10 * target.key[0] + rank, *target.B)


def poisoned() -> bool:
    """Average statistics that are NaN on rank 0, and return whether this rank's result is, if it has one."""
    target = Target((0, 0), 1, (2, 2), (3, 3))
    A, B = torch.eye(2), torch.eye(3)
    if dist.get_rank() == 0:
        A[0, 1] = A[1, 0] = torch.nan
    found = Averaging(world(), [target], {target.key: (A, B)}, A).wait()
    return bool(found[target.key][0].isnan().any()) if found else False
