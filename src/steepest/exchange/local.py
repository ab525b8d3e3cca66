"""Matrices that are stepped where they are: those of one process, and whole ones of which no other rank has a shard."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial

from torch import Tensor

from steepest.exchange.bucket import Bucket, Directions, Move, Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import PLAIN, local, meta_shard, shard_like
from steepest.stack.stack import Pieces, Segment, Stack


class LocalBucket(Bucket):
    """A bucket of one stack that is stepped here, by views of gradients and weights."""

    communicates = False

    def __init__(self, stack: Stack, params: Sequence[Tensor], peers: Peers | None = None, replica: int = 0) -> None:
        self.peers = peers
        self.counts = replica == 0
        self.stacks = [stack]
        self.params = params

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Bucket.state`."""
        (stack,) = self.stacks
        for segment in stack.segments:
            p = self.params[segment.index]
            yield segment.index, {name: shard_like(p, x) for name, x in stack.views(segment).items()}

    def gather(self, grads: Tensors, weights: Tensors | None) -> Generator[None, None, tuple[Pieces, Pieces | None]]:
        """See `Bucket.gather`."""
        yield from ()
        return self._pieces(grads), None if weights is None else self._pieces(weights)

    def scatter(self, directions: Sequence[Directions]) -> Generator[None, None, list[Move]]:
        """See `Bucket.scatter`."""
        yield from ()
        moves = []
        for made in directions:
            everything_moves = made.finite is None and all(made.moved)
            for segment in made.stack.segments:
                if everything_moves:
                    D, may_stay = made.D[segment.slots], False
                elif any(made.moved[segment.slots]):
                    D, may_stay = made.of(segment), made.may_stay(segment)
                else:
                    continue
                p, view, piece = self.params[segment.index], segment.view, segment.piece
                W, D = view.cut(p if type(p) in PLAIN else local(p), piece), view.unbatch(D, piece)
                t = made.stack.t[segment.start]
                moves.append(Move(segment.index, W, D, may_stay, t, partial(_in_whole, p, segment)))
        return moves

    def _pieces(self, tensors: Tensors) -> Pieces:
        pieces = {}
        for segment in self.stacks[0].segments:
            x = tensors[segment.index]
            if x is not None:
                pieces[segment.key] = segment.view.matrices(x, segment.piece)
        return pieces


def _in_whole(p: Tensor, segment: Segment) -> Tensor:
    return segment.view.cut(meta_shard(p), segment.piece)
