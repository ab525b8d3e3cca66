"""Matrices that are stepped where they are: those of one process, and whole ones that no other rank has a part of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from steepest.exchange.lot import Directions, Lot, Move, Tensors
from steepest.exchange.placement import local, place, shard_like
from steepest.linalg.phases import phase
from steepest.stack.stack import Seat, Stack, Windows

if TYPE_CHECKING:
    from steepest.exchange.domain import Domain


class Here(Lot):
    """One stack, stepped here. Nothing is copied on the way: windows are views of gradients and weights."""

    travels = False

    def __init__(
        self,
        number: int,
        stack: Stack,
        params: Sequence[Tensor],
        domain: Domain | None = None,
        replica: int = 0,
    ) -> None:
        self.group = number
        self.domain = domain
        self.counts = replica == 0
        self.stacks = [stack]
        self.params = params

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Lot.state`."""
        for seat in self.stacks[0].seats:
            p, views = self.params[seat.index], self.stacks[0].views(seat)
            yield seat.index, {name: shard_like(p, x) for name, x in views.items()}

    @phase("gather")
    def gather(self, tensors: Tensors) -> Callable[[], Windows]:
        """See `Lot.gather`."""
        seats = [(seat, tensors[seat.index]) for seat in self.stacks[0].seats]
        windows = {seat.key: seat.view.window(x, seat.piece) for seat, x in seats if x is not None}
        return lambda: windows

    def spread(self, directions: Sequence[Directions]) -> Callable[[], list[Move]]:
        """See `Lot.spread`."""
        moves = [
            self._move(made, seat)
            for made in directions
            for seat in made.stack.seats
            if any(made.moved[seat.start : seat.stop])
        ]
        return lambda: moves

    def _move(self, made: Directions, seat: Seat) -> Move:
        p, view, piece = self.params[seat.index], seat.view, seat.piece
        return Move(
            seat.index,
            view.window(local(p), piece),
            view.shaped(made.marked(seat), piece),
            made.stays(seat),
            made.stack.t[seat.start],
            partial(_part, p, seat),
        )


def _part(p: Tensor, seat: Seat) -> Tensor:
    return seat.view.window(place(p), seat.piece)
