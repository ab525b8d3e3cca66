"""Peers: the ranks that hold shards or replicas of the same parameters, and how they agree before a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

# What belongs to a process group is cached by weak reference, so that the caches don't keep the group alive: once a
# group has been destroyed, gloo's threads must end, because they may abort the process when Python ends.
_subgroups: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], Peers]] = WeakKeyDictionary()
_host_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@dataclass(frozen=True)
class Peers:
    """The ranks of a process group, numbered from 0 within it; ``ranks`` are their numbers in the world."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    @classmethod
    def over(cls, group: dist.ProcessGroup) -> Peers:
        """Return the peers of a process group."""
        return cls(group, tuple(dist.get_process_group_ranks(group)))

    @classmethod
    def among(cls, ranks: Sequence[int]) -> Peers:
        """Return the peers for some ranks: the whole world shares its group, other ranks get a group of their own."""
        everyone, ranks = world(), tuple(sorted(ranks))
        if ranks == everyone.ranks:
            return everyone
        subgroups = _subgroups.setdefault(everyone.group, {})
        if ranks not in subgroups:
            subgroups[ranks] = cls.over(dist.new_group(ranks, use_local_synchronization=True))
        return subgroups[ranks]

    @property
    def me(self) -> int:
        """Return the number of this rank among its peers."""
        return self.ranks.index(dist.get_rank())

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)

    @property
    def host_group(self) -> dist.ProcessGroup:
        """Return a process group of the same ranks that communicates tensors of the host."""
        if "cpu:" in dist.get_backend_config(self.group):
            return self.group
        if self.group not in _host_groups:
            _host_groups[self.group] = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return _host_groups[self.group]

    def agree(self, flags: Sequence[bool], count: int = 0) -> tuple[list[bool], int]:
        """Return the flags that any rank raises, and the sum of all ranks' counts.

        The ranks agree between hosts, over gloo, so no rank waits for a device.
        """
        message = torch.zeros(len(flags) + self.size, dtype=torch.int64, device="cpu")
        message[: len(flags)] = torch.tensor(flags, dtype=torch.int64, device="cpu")
        message[len(flags) + self.me] = count
        dist.all_reduce(message, dist.ReduceOp.MAX, self.host_group)
        return [bool(flag) for flag in message[: len(flags)].tolist()], int(message[len(flags) :].sum())

    def all(self, mask: Tensor) -> Tensor:
        """Return where ``mask`` is True on every rank; the ranks agree between devices, and no host waits."""
        agreed = mask.to(torch.uint8)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, self.group)
        return agreed.bool()

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a number of each rank, 0-d: in the order of ranks, on a device, and no host waits."""
        every = x.new_zeros(self.size)
        every[self.me] = x
        dist.all_reduce(every, group=self.group)  # which adds zeros
        return every.sum()

    def check_same(self, digest: str, what: str) -> None:
        """Raise on every rank unless ``digest``, which has 16 hexadecimal digits or more, is the same on all."""
        mine = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device="cpu")
        ends = torch.cat([mine, -mine])
        dist.all_reduce(ends, dist.ReduceOp.MAX, self.host_group)
        if int(ends[0]) != -int(ends[1]):
            raise RuntimeError(
                f"{what} differs between the ranks {list(self.ranks)}: all must make their optimizer of the same "
                "parameters, in the same order, with the same options"
            )


def world() -> Peers:
    """Return all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return Peers.over(group)
