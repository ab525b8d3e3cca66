"""A lot: matrices of one parameter group that take a step together, wherever that is.

The engine takes every lot on the same trip: *gather*, rule, *spread*. A `steepest.exchange.local.Here` lot is stepped
where its parameters are, and its trip has no way to go. A `steepest.exchange.mesh.Shared` lot holds parameters of which
several ranks have parts or replicas: gradients travel to owners, directions back, and the trip pauses meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steepest.rule import LowRank, Rule
from steepest.stack.stack import Answers, Seat, Stack, Windows, to_device

if TYPE_CHECKING:
    from steepest.exchange.domain import Domain

Tensors = Sequence[Tensor | None]
"""One per parameter of a group: what this rank holds of it, or of its gradient. None takes no part in the step."""


@dataclass(frozen=True)
class Directions:
    """What a rule made of the gradients of one stack."""

    stack: Stack
    D: Tensor
    """``[B, m, n]``; read only where ``moved``."""
    moved: Sequence[bool]
    """For every slot, whether it takes this step."""
    low_rank: LowRank | None
    """The same in factors, if the rule gave them so."""
    finite: Tensor | None
    """``[B, 1, 1]`` on the device, False where the step must leave no trace; None if it is True everywhere."""

    def stays(self, seat: Seat) -> bool:
        """Whether some matrix in a seat may stay as it is."""
        return self.finite is not None or not all(self.moved[seat.start : seat.stop])

    def marked(self, seat: Seat) -> Tensor:
        """The directions of a seat ``[b, m, n]``, NaN in matrices that stay: a mark that travels with them."""
        return self._marked(self.D, seat)

    def factors(self, seat: Seat) -> LowRank:
        """The same as ``marked``, in factors: NaN in one of them is NaN in the product."""
        assert self.low_rank is not None
        return LowRank(self._marked(self.low_rank.left, seat), self.low_rank.right[seat.slots])

    def _marked(self, x: Tensor, seat: Seat) -> Tensor:
        x = x[seat.slots]
        if self.finite is not None:
            x = x.masked_fill(~self.finite[seat.slots], torch.nan)
        moved = self.moved[seat.start : seat.stop]
        if not all(moved):
            x = x.masked_fill(~to_device(moved, x.device).view(-1, 1, 1), torch.nan)
        return x


@dataclass(slots=True)
class Move:
    """A part of a parameter that moves."""

    index: int
    """The parameter's position in its group."""
    W: Tensor
    """The part, a view of the weights."""
    D: Tensor
    """The direction, of the same shape; NaN where weights stay as they are."""
    may_stay: bool
    """Whether there may be NaN."""
    t: Tensor | None
    """How many updates its first matrix has had; known where the rounding of weights asks for it."""
    place: Callable[[], Tensor]
    """Where it lies in the whole parameter: as the same part of a tensor of that shape, on the meta device."""


class Lot(ABC):
    """Matrices of one group, and the stacks that this process steps of them."""

    group: int
    """Which parameter group."""
    stacks: Sequence[Stack]
    """Of the matrices that are stepped here."""
    domain: Domain | None
    """The ranks that hold parts of its parameters; None: this one alone."""
    travels: bool
    """Whether gathering and spreading take time."""
    counts: bool = True
    """Whether what is skipped in it is this rank's to count; else another has a replica, and counts."""

    @abstractmethod
    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What ``Optimizer.state`` shows, by position of the parameter; placeholders for what lives on other ranks."""

    @abstractmethod
    def gather(self, tensors: Tensors) -> Callable[[], Windows]:
        """Set out to bring tensors here; on all ranks the same ones are None.

        Returns:
            What waits for them, and returns the windows of all pieces that are stepped here and take part.
        """

    @abstractmethod
    def spread(self, directions: Sequence[Directions]) -> Callable[[], list[Move]]:
        """Set out to bring directions to whoever holds the weights, of the tensors that were gathered last.

        Returns:
            What waits for them, and returns how this rank's weights move.
        """

    def borrowed(self, rule: Rule) -> Generator[None, None, Answers]:
        """Have done elsewhere what the step has put off and others do; pauses while that is under way."""
        yield from ()
        return {}
