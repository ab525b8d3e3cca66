"""Ranks that hold parts, or replicas, of the same parameters, and what they agree on before a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

# What is made for a process group, or found for it, is kept as long as the group lives, and doesn't keep it alive: when
# it has been destroyed, gloo's threads must end, or may abort the process when Python ends.
_parts: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], Domain]] = WeakKeyDictionary()
_hosts: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@dataclass(frozen=True)
class Domain:
    """A group of ranks. Ranks count within it, from 0; ``ranks`` are their numbers in the world."""

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    @classmethod
    def over(cls, group: dist.ProcessGroup) -> Domain:
        """The domain of a process group."""
        return cls(group, tuple(dist.get_process_group_ranks(group)))

    @classmethod
    def among(cls, ranks: Sequence[int]) -> Domain:
        """The domain of some ranks; those of the whole world share its group, others get one of their own."""
        everyone, ranks = world(), tuple(sorted(ranks))
        if ranks == everyone.ranks:
            return everyone
        parts = _parts.setdefault(everyone.group, {})
        if ranks not in parts:
            parts[ranks] = cls.over(dist.new_group(ranks, use_local_synchronization=True))
        return parts[ranks]

    @property
    def me(self) -> int:
        """This rank, counted in the domain."""
        return self.ranks.index(dist.get_rank())

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    @property
    def host_group(self) -> dist.ProcessGroup:
        """A process group of the same ranks that takes tensors of the host."""
        if "cpu:" in dist.get_backend_config(self.group):
            return self.group
        if self.group not in _hosts:
            _hosts[self.group] = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return _hosts[self.group]

    def agree(self, flags: Sequence[bool], count: int) -> tuple[list[bool], int]:
        """Which flags any rank raises, and the sum of all ranks' counts.

        Between hosts, over gloo: no device is waited for.
        """
        told = torch.zeros(len(flags) + self.size, dtype=torch.int64)
        told[: len(flags)] = torch.tensor(flags, dtype=torch.int64)
        told[len(flags) + self.me] = count
        dist.all_reduce(told, dist.ReduceOp.MAX, self.host_group)
        return [bool(flag) for flag in told[: len(flags)].tolist()], int(told[len(flags) :].sum())

    def all(self, mask: Tensor) -> Tensor:
        """Where ``mask`` is True on every rank. Between devices; no host waits."""
        agreed = mask.to(torch.uint8)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, self.group)
        return agreed.bool()

    def check_same(self, digest: str, what: str) -> None:
        """Raise on every rank unless ``digest``, 16 hexadecimal digits or more, is the same on all."""
        mine = torch.tensor([int(digest[:15], 16)], dtype=torch.int64)
        ends = torch.cat([mine, -mine])
        dist.all_reduce(ends, dist.ReduceOp.MAX, self.host_group)
        if int(ends[0]) != -int(ends[1]):
            raise RuntimeError(
                f"{what} differs between the ranks {list(self.ranks)}: all must make their optimizer of the same "
                "parameters, in the same order, with the same options"
            )


def world() -> Domain:
    """All ranks."""
    group = dist.group.WORLD
    assert group is not None
    return Domain.over(group)
