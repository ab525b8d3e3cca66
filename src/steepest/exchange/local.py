"""Matrices that are stepped where they are: those of one process, and whole ones of which no other rank has a shard."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from steepest.exchange.bucket import Bucket, Directions, Move, Staying, Tensors
from steepest.exchange.peers import Peers
from steepest.exchange.shards import PLAIN, local, meta_shard, shard_like
from steepest.rule import Statistics
from steepest.stack.stack import Pieces, Segment, Stack


class LocalBucket(Bucket):
    """A bucket of one stack that is stepped here, by views of gradients and weights."""

    communicates = False

    def __init__(self, stack: Stack, params: Sequence[Tensor], peers: Peers | None = None, replica: int = 0) -> None:
        self.peers = peers
        self.counts = replica == 0
        self.stacks = [stack]
        self.device = stack.device
        self.params = params
        self._takes_part: Sequence[bool] = ()
        """For each parameter, whether it takes part in the step."""
        self._at_hand: Pieces | None = None
        """The pieces of the gradients of the step that begins."""

    @property
    def segments(self) -> Sequence[Segment]:
        """See `Bucket.segments`."""
        return self.stacks[0].segments

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Bucket.state`."""
        (stack,) = self.stacks
        for segment in stack.segments:
            p = self.params[segment.index]
            yield segment.index, {name: shard_like(p, x) for name, x in stack.views(segment).items()}
            if segment.bias is not None:
                yield segment.bias, stack.clocks(segment)

    def at_hand(self, grads: Tensors) -> Pieces:
        """See `Bucket.at_hand`."""
        self._at_hand = self._pieces(grads)
        return self._at_hand

    def gather(self, grads: Tensors, weights: Tensors | None) -> Generator[None, None, tuple[Pieces, Pieces | None]]:
        """See `Bucket.gather`."""
        yield from ()
        self._takes_part = [x is not None for x in grads]
        pieces, self._at_hand = self._at_hand, None
        return pieces or self._pieces(grads), None if weights is None else self._pieces(weights)

    def statistics(
        self, captured: Mapping[int, Statistics | None]
    ) -> Generator[None, None, Mapping[tuple[int, int], Statistics]]:
        """See `Bucket.statistics`."""
        yield from ()
        segments = self.stacks[0].segments if captured else ()
        return {s.key: s.part(here) for s in segments if (here := captured.get(s.index)) is not None}

    def scatter(self, directions: Sequence[Directions]) -> Generator[None, None, list[Move]]:
        """See `Bucket.scatter`."""
        yield from ()
        moves = []
        for made in directions:
            everything_moves, ranges = all(made.moved), iter(made.stack.groups)
            stays = None if everything_moves and made.lost is None else made.stays()
            start, stop, staying, matrices = 0, 0, None, made.D.unbind()
            for segment in made.stack.segments:
                if segment.start >= stop:
                    _, start, stop = next(ranges)
                    staying = None if stays is None else Staying(made.D[start:stop], stays[start:stop])
                if not everything_moves and not any(made.moved[segment.slots]):
                    continue
                alone = segment.stop - segment.start == 1
                D = matrices[segment.start] if alone else made.D[segment.slots]
                p, view, piece = self.params[segment.index], segment.view, segment.piece
                t = made.stack.t[segment.start] if p.dtype == torch.bfloat16 else None
                if segment.bias is not None:
                    rows, b = view.blocks[piece][0], local(self.params[segment.bias])
                    if self._takes_part[segment.bias]:
                        column, whole = D[..., -1].reshape(-1), partial(_rows_in_whole, b, rows)
                        moves.append(Move(segment.bias, b[rows], column, False, t, whole, staying))
                    D = D[..., :-1]
                if self._takes_part[segment.index]:
                    W, D = view.cut(p if type(p) in PLAIN else local(p), piece), view.unbatch(D, piece)
                    moves.append(Move(segment.index, W, D, False, t, partial(_in_whole, p, segment), staying))
        return moves

    def _pieces(self, tensors: Tensors) -> Pieces:
        pieces = {}
        for segment in self.stacks[0].segments:
            x, view, piece = tensors[segment.index], segment.view, segment.piece
            bias = None if segment.bias is None else tensors[segment.bias]
            if segment.bias is None or bias is None is x:
                if x is not None:
                    pieces[segment.key] = view.matrices(x, piece)
                continue
            # The half of a layer that has no gradient counts as zero, and is not moved.
            x = torch.zeros_like(local(self.params[segment.index])) if x is None else x
            bias = torch.zeros_like(local(self.params[segment.bias])) if bias is None else bias
            pieces[segment.key] = view.joined(view.matrices(x, piece), bias, piece)
        return pieces


def _rows_in_whole(bias: Tensor, rows: slice) -> Tensor:
    return meta_shard(bias)[rows]


def _in_whole(p: Tensor, segment: Segment) -> Tensor:
    return segment.view.cut(meta_shard(p), segment.piece)
