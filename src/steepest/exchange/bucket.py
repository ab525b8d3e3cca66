"""Buckets: matrices that are gathered, stepped and scattered together.

The engine steps every bucket alike: *gather* gradients, ask the rule for directions, *scatter* them, and apply them. A
`steepest.exchange.local.LocalBucket` is stepped where its parameters are, and communicates nothing. A
`steepest.exchange.sharded.ShardedBucket` has parameters of which several ranks hold shards or replicas: gradients are
sent to owners, directions are sent back, and the step pauses in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.exchange.peers import Peers
from steepest.rule import LowRank, Statistics
from steepest.stack.stack import Pieces, Segment, Stack, to_device

Tensors = Sequence[Tensor | None]
"""For each parameter, this rank's shard of it or of its gradient; None if it takes no part in the step."""


@dataclass(frozen=True)
class Directions:
    """The directions that a rule has computed for one stack."""

    stack: Stack
    D: Tensor
    """``[B, m, n]``; anything where the step must leave no trace, and zero in slots that are not in ``moved``."""
    moved: Sequence[bool]
    """For each slot, whether its matrix takes this step."""
    low_rank: LowRank | None
    """The same directions as factors, if the rule has returned factors."""
    lost: Tensor | None
    """``[B, 1, 1]``, True where the step must leave no trace; None if that is nowhere."""
    slopes: Tensor | None = None
    """``⟨D, G⟩`` of each matrix, ``[B]``, in float64, and 0 for those that stay; where a rule clips directions."""

    def stays(self) -> Tensor | None:
        """Return ``[B, 1, 1]``, True for the matrices that stay where they are; None if there can be none."""
        if all(self.moved):
            return self.lost
        idle = to_device([not moves for moves in self.moved], self.D.device).view(-1, 1, 1)
        return idle if self.lost is None else self.lost | idle

    def of(self, segment: Segment) -> Tensor:
        """Return the directions of a segment ``[b, m, n]``; matrices that stay are marked by NaN, which travels."""
        return self._marked(self.D, segment)

    def factors_of(self, segment: Segment) -> LowRank:
        """Return the same directions as factors; NaN in one factor is NaN in the product."""
        assert self.low_rank is not None
        return LowRank(self._marked(self.low_rank.left, segment), self.low_rank.right[segment.slots])

    def _marked(self, x: Tensor, segment: Segment) -> Tensor:
        x = x[segment.slots]
        if self.lost is not None:
            x = x.masked_fill(self.lost[segment.slots], torch.nan)
        moved = self.moved[segment.slots]
        if not all(moved):
            x = x.masked_fill(~to_device(moved, x.device).view(-1, 1, 1), torch.nan)
        return x


@dataclass(slots=True)
class Staying:
    """The directions of some neighbouring matrices of a stack, of which a device knows which ones stay."""

    D: Tensor
    """``[b, m, n]``."""
    stays: Tensor
    """``[b, 1, 1]``, True for the matrices that stay."""

    def zero(self) -> None:
        """Zero the directions of the matrices that stay, in place."""
        self.D.masked_fill_(self.stays, 0)


@dataclass(slots=True)
class Move:
    """A part of a parameter's shard, and the direction in which it moves."""

    index: int
    """The number of the parameter, counted over all groups."""
    W: Tensor
    """The part, as a view of the weights."""
    D: Tensor
    """The direction, of the same shape; NaN where weights stay as they are."""
    may_stay: bool
    """Whether there may be NaN in the direction."""
    t: Tensor | None
    """The number of updates that its first matrix has had, where stochastic rounding needs it."""
    in_whole: Callable[[], Tensor]
    """Returns the same part of a meta tensor of the whole parameter's shape; its strides and offset tell positions."""
    staying: Staying | None = None
    """What the direction is a part of, where a device knows which matrices stay; None if it moves anyway."""


class Bucket(ABC):
    """Matrices that are stepped together, and the stacks of those that this rank steps."""

    stacks: Sequence[Stack]
    """The stacks of the matrices that this rank steps."""
    peers: Peers | None
    """The ranks that hold shards of its parameters; None if only this rank does."""
    device: torch.device
    """The device of its parameters."""
    communicates: bool
    """Whether gradients and directions are sent between ranks."""
    counts: bool = True
    """Whether this rank counts the updates that are skipped in it; False if the rank of another replica does."""

    @property
    @abstractmethod
    def segments(self) -> Sequence[Segment]:
        """Return the segments of its matrices, also of those that other ranks step, which have no slots here."""

    @abstractmethod
    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the state that ``Optimizer.state`` shows, by the number of the parameter.

        State that lives on other ranks is shown as a placeholder.
        """

    def at_hand(self, grads: Tensors) -> Pieces:
        """Return the pieces of gradients that this rank has before they are gathered."""
        return {}

    @abstractmethod
    def gather(self, grads: Tensors, weights: Tensors | None) -> Generator[None, None, tuple[Pieces, Pieces | None]]:
        """Gather gradients, and weights if they are given; pause while they travel.

        The tensors that are None are the same on all ranks.

        Returns:
            The pieces that this rank steps and that take part in the step, of gradients and of weights.
        """

    @abstractmethod
    def statistics(
        self, captured: Mapping[int, Statistics | None]
    ) -> Generator[None, None, Mapping[tuple[int, int], Statistics]]:
        """Gather what was captured in layers, by the numbers of their weights; pause while it travels.

        The numbers are the same on all ranks; None stands for what only other ranks have captured.

        Returns:
            The statistics of each piece that this rank steps, and that got some.
        """

    @abstractmethod
    def scatter(self, directions: Sequence[Directions]) -> Generator[None, None, list[Move]]:
        """Scatter directions, of the gradients that were gathered last, to the ranks with weights; pause meanwhile.

        Returns:
            The moves of this rank's weights.
        """
