"""The shard of a parameter that each rank holds: rectangles, which are the cells of a grid.

Replicas, shards, and shards of shards are all alike: every placement by dimensions cuts a parameter along some of its
dimensions, and puts each cell on one rank or, replicated, on several.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import itemgetter


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of entries, in a parameter's own dimensions.

    >>> Rectangle((0, 2), (4, 4)) & Rectangle((3, 0), (4, 4))
    Rectangle(start=(3, 2), shape=(1, 2))
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Rectangle:
        """Return the rectangle that covers a parameter of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Return the number of entries."""
        return math.prod(self.shape)

    @property
    def empty(self) -> bool:
        """Return whether there are no entries."""
        return 0 in self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """Return the slices that cut it out of the parameter."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    def within(self, outer: Rectangle) -> tuple[slice, ...]:
        """Return the slices that cut it out of another rectangle, which contains it."""
        sides = zip(self.start, self.shape, outer.start, strict=True)
        return tuple(slice(a - origin, a - origin + n) for a, n, origin in sides)

    def __and__(self, other: Rectangle) -> Rectangle:
        """Return the intersection of two rectangles."""
        sides = list(zip(self.start, self.shape, other.start, other.shape, strict=True))
        start = tuple(max(a, b) for a, _, b, _ in sides)
        return Rectangle(
            start, tuple(max(min(a + n, b + k) - s, 0) for (a, n, b, k), s in zip(sides, start, strict=True))
        )


@dataclass(frozen=True)
class Layout:
    """The shard of a parameter that each rank of a group holds. Parameters that are laid out alike share a layout.

    Args:
        shape: the shape of the parameter.
        shards: one for each rank; empty for ranks that hold nothing, equal for replicas.

    Raises:
        ValueError: unless the distinct shards are the cells of a grid, as every sharding by dimensions makes them.

    >>> Layout.sharded((37, 8), mesh=(4,), placements=(0,)).shards[3]
    Rectangle(start=(30, 0), shape=(7, 8))
    """

    shape: tuple[int, ...]
    shards: tuple[Rectangle, ...]

    def __post_init__(self) -> None:
        tiled = all(_tiles(spans, n) for spans, n in zip(self._spans, self.shape, strict=True))
        if not (tiled and len(self._holders) == math.prod(map(len, self._spans))) and 0 not in self.shape:
            raise ValueError(
                f"shards={list(dict.fromkeys(self.shards))[:9]!r}: must be all the cells of a grid over a parameter of "
                f"shape {list(self.shape)}"
            )

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def replicated(cls, shape: Sequence[int], world: int) -> Layout:
        """Return the layout that has the whole parameter on every rank."""
        return cls(tuple(shape), (Rectangle.whole(shape),) * world)

    @classmethod
    def sharded(cls, shape: Sequence[int], mesh: Sequence[int], placements: Sequence[int | None]) -> Layout:
        """Return the layout over a mesh of ranks, which are numbered row by row.

        Each dimension of the mesh cuts a dimension of the parameter, or replicates where its placement is None. The
        cuts are those of torch.chunk and of DTensor: shards of ``ceil(rows / ranks)``, and the rest for the last rank.
        """
        shards = []
        for coordinate in product(*map(range, mesh)):
            start, size = [0] * len(shape), list(shape)
            for ranks, i, d in zip(mesh, coordinate, placements, strict=True):
                if d is not None:
                    length = -(-size[d] // ranks)
                    start[d] += min(i * length, size[d])
                    size[d] = max(min(length, size[d] - i * length), 0)
            shards.append(Rectangle(tuple(start), tuple(size)))
        return cls(tuple(shape), tuple(shards))

    @property
    def world(self) -> int:
        """Return the number of ranks."""
        return len(self.shards)

    @property
    def whole(self) -> Rectangle:
        """Return the rectangle that covers the parameter."""
        return Rectangle.whole(self.shape)

    @cached_property
    def digest(self) -> str:
        """Return a digest that is equal for equal layouts, in every process."""
        return fingerprint(self.shape, *((shard.start, shard.shape) for shard in self.shards))

    @cached_property
    def _holders(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return the ranks that hold each cell, by the start of the cell."""
        holders: dict[tuple[int, ...], list[int]] = {}
        for rank, shard in enumerate(self.shards):
            if not shard.empty:
                holders.setdefault(shard.start, []).append(rank)
        return {start: tuple(ranks) for start, ranks in holders.items()}

    @cached_property
    def _replicas(self) -> int:
        """Return the largest number of ranks that hold the same cell, and at least 1."""
        return max(map(len, self._holders.values()), default=1)

    @cached_property
    def _spans(self) -> tuple[list[tuple[int, int]], ...]:
        """Return for each dimension the starts and lengths of its cells, in order."""
        shards = {shard for shard in self.shards if not shard.empty}
        return tuple(sorted({(s.start[d], s.shape[d]) for s in shards}) for d in range(len(self.shape)))

    def replica(self, rank: int) -> int:
        """Return the index of a rank among the ranks that hold the same shard.

        Ranks that hold nothing are assigned to replicas in turn.
        """
        shard = self.shards[rank]
        return rank % self._replicas if shard.empty else bisect_left(self._holders[shard.start], rank)

    def cells(self, rectangle: Rectangle) -> list[tuple[Rectangle, tuple[int, ...]]]:
        """Return the intersections of the cells with a rectangle, each with the ranks that hold the cell."""
        if rectangle.empty:
            return []
        sides = []  # for each dimension: the start of each cell, the start of what is cut of it, and its length
        for spans, low, n in zip(self._spans, rectangle.start, rectangle.shape, strict=True):
            first = bisect_right(spans, low, key=itemgetter(0)) - 1
            last = bisect_left(spans, low + n, key=itemgetter(0))
            cuts = [(a, max(a, low), min(a + k, low + n)) for a, k in spans[first:last]]
            sides.append([(a, start, stop - start) for a, start, stop in cuts])
        found = []
        for cell in product(*sides):
            at, start, shape = zip(*cell, strict=True) if cell else ((), (), ())
            found.append((Rectangle(start, shape), self._holders[at]))
        return found

    def source(self, holders: Sequence[int], owner: int) -> int:
        """Return the rank that sends a cell to ``owner``, of the ranks that hold it.

        That is the owner itself if it holds the cell, else the rank of the owner's own replica.
        """
        return holders[self.replica(owner) % len(holders)]


def fingerprint(*values: object) -> str:
    """Return a digest of values whose ``repr`` is the same in every process."""
    return hashlib.sha256("\n".join(map(repr, values)).encode()).hexdigest()


def _tiles(spans: Sequence[tuple[int, int]], length: int) -> bool:
    """Return whether intervals (start, length), in order, cover ``0:length`` without gap or overlap."""
    edge = 0
    for start, n in spans:
        if start != edge:
            return False
        edge += n
    return edge == length
