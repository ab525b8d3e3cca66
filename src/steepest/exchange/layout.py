"""Which part of a parameter each rank holds: rectangles, the cells of a grid.

Whole on every rank, in shards, in shards of shards: every placement by dimensions cuts a parameter along some of its
dimensions and lays the cells out on ranks, each on one or, replicated, on several.
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
    """A box of entries, in a parameter's own dimensions.

    >>> Rectangle((0, 2), (4, 4)) & Rectangle((3, 0), (4, 4))
    Rectangle(start=(3, 2), shape=(1, 2))
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Rectangle:
        """All of a parameter of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return 0 in self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """What indexes it in the parameter."""
        return self.within(Rectangle.whole(self.shape))

    def within(self, window: Rectangle) -> tuple[slice, ...]:
        """What indexes it in a window of the parameter that contains it."""
        places = zip(self.start, self.shape, window.start, strict=True)
        return tuple(slice(a - origin, a - origin + n) for a, n, origin in places)

    def __and__(self, other: Rectangle) -> Rectangle:
        """What both cover."""
        sides = list(zip(self.start, self.shape, other.start, other.shape, strict=True))
        start = tuple(max(a, b) for a, _, b, _ in sides)
        return Rectangle(
            start, tuple(max(min(a + n, b + k) - s, 0) for (a, n, b, k), s in zip(sides, start, strict=True))
        )


@dataclass(frozen=True)
class Layout:
    """Which rectangle of a parameter each rank of a group holds. Parameters that lie alike share one.

    Args:
        shape: the parameter's.
        parts: by rank; empty rectangles for ranks that hold nothing, the same one for replicas.

    Raises:
        ValueError: unless the distinct parts are the cells of a grid, as every sharding by dimensions makes them.

    >>> Layout.sharded((37, 8), mesh=(4,), placements=(0,)).parts[3]
    Rectangle(start=(30, 0), shape=(7, 8))
    """

    shape: tuple[int, ...]
    parts: tuple[Rectangle, ...]

    def __post_init__(self) -> None:
        tiled = all(_tiles(spans, n) for spans, n in zip(self._spans, self.shape, strict=True))
        if not (tiled and len(self._holders) == math.prod(map(len, self._spans))) and 0 not in self.shape:
            raise ValueError(
                f"parts={list(dict.fromkeys(self.parts))[:9]!r}: must be all the cells of a grid over a parameter of "
                f"shape {list(self.shape)}"
            )

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def replicated(cls, shape: Sequence[int], world: int) -> Layout:
        """Whole on every rank."""
        return cls(tuple(shape), (Rectangle.whole(shape),) * world)

    @classmethod
    def sharded(cls, shape: Sequence[int], mesh: Sequence[int], placements: Sequence[int | None]) -> Layout:
        """Ranks in a mesh, row by row; each of its dimensions cuts a dimension of the parameter, or None: replicates.

        The cuts are torch.chunk's, and DTensor's: pieces of ``ceil(rows / ranks)``, and whatever is left for the last.
        """
        parts = []
        for place in product(*map(range, mesh)):
            start, size = [0] * len(shape), list(shape)
            for ranks, i, d in zip(mesh, place, placements, strict=True):
                if d is not None:
                    piece = -(-size[d] // ranks)
                    start[d] += min(i * piece, size[d])
                    size[d] = max(min(piece, size[d] - i * piece), 0)
            parts.append(Rectangle(tuple(start), tuple(size)))
        return cls(tuple(shape), tuple(parts))

    @property
    def world(self) -> int:
        """Ranks."""
        return len(self.parts)

    @property
    def whole(self) -> Rectangle:
        """All of the parameter."""
        return Rectangle.whole(self.shape)

    @cached_property
    def digest(self) -> str:
        """Equal for equal layouts, in every process."""
        return fingerprint(self.shape, *((part.start, part.shape) for part in self.parts))

    @cached_property
    def _holders(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Where the cells start, with the ranks that hold each."""
        holders: dict[tuple[int, ...], list[int]] = {}
        for rank, part in enumerate(self.parts):
            if not part.empty:
                holders.setdefault(part.start, []).append(rank)
        return {start: tuple(ranks) for start, ranks in holders.items()}

    @cached_property
    def _copies(self) -> int:
        """Of the cell that has most, and at least 1."""
        return max(map(len, self._holders.values()), default=1)

    @cached_property
    def _spans(self) -> tuple[list[tuple[int, int]], ...]:
        """For each dimension where its cells start and how long they are, in order."""
        parts = {part for part in self.parts if not part.empty}
        return tuple(sorted({(p.start[d], p.shape[d]) for p in parts}) for d in range(len(self.shape)))

    def replica(self, rank: int) -> int:
        """The how-manieth a rank is among those that hold the same; those that hold nothing are dealt out."""
        part = self.parts[rank]
        return rank % self._copies if part.empty else bisect_left(self._holders[part.start], rank)

    def meet(self, window: Rectangle) -> list[tuple[Rectangle, tuple[int, ...]]]:
        """The cells that meet a window, cut to it, each with the ranks that hold it."""
        if window.empty:
            return []
        sides = []  # for each dimension: where a cell starts, where what is cut of it starts, and its length
        for spans, low, n in zip(self._spans, window.start, window.shape, strict=True):
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
        """Which of the ranks that hold a cell sends it to ``owner``: itself, or the one in its own replica."""
        return holders[self.replica(owner) % len(holders)]


def fingerprint(*things: object) -> str:
    """A digest of things that print alike in every process."""
    return hashlib.sha256("\n".join(map(repr, things)).encode()).hexdigest()


def _tiles(spans: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether intervals (start, length), in order, cover ``0:length`` without gap or overlap."""
    edge = 0
    for start, n in spans:
        if start != edge:
            return False
        edge += n
    return edge == length
