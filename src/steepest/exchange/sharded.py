"""The exchange between ranks: gradients are sent to the ranks that step them, and directions are sent back.

A matrix is stepped by one rank, its owner, which has all of its state. A `ShardedBucket` holds parameters that are sent
together. To gather, one ``all_to_all_single`` brings the shards of their gradients to the owners, which join them. To
scatter, one more brings each rank the directions of its own shards. DDP, FSDP2, HSDP and tensor parallelism differ in
the rectangle of a parameter that each rank holds, and in nothing else. Bytes are moved, never added, so the result is
that of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.exchange.all_to_all import AllToAll
from steepest.exchange.bucket import Bucket, Directions, Move, Tensors
from steepest.exchange.dtensor import Owned
from steepest.exchange.peers import Peers
from steepest.exchange.plan import Plan, Transfer
from steepest.exchange.shards import local
from steepest.rule import LowRank, Statistics
from steepest.stack.stack import Pieces, Segment, Way, lay_out, rule_of, state_alone, state_dtype

Made = Mapping[tuple[int, int], tuple[Directions, Segment]]
"""The directions of each piece that was stepped, by the key of its segment, and the segment in the stack."""


class ShardedBucket(Bucket):
    """The jobs of one bucket of a plan."""

    peers: Peers
    communicates = True

    def __init__(
        self,
        ways: Sequence[Way | None],
        groups: Sequence[Mapping[str, Any]],
        params: Sequence[Tensor],
        peers: Peers,
        plan: Plan,
        bucket: int,
        segments: Sequence[Sequence[Segment]],
    ) -> None:
        """Take the jobs of one bucket of the plan; ``segments`` has the pieces of each job of the plan.

        Groups have options; ways and parameters are all, by the numbers in segments.
        """
        self.peers = peers
        self.me = peers.me
        self.plan = plan
        self.inward = plan.inward(bucket, self.me)
        self.outward = plan.outward(bucket, self.me)
        self.jobs = plan.buckets[bucket]
        self.owned = [job for job in self.jobs if plan.owners[job] == self.me]
        self.segments = {job: segments[job] for job in self.jobs}
        self.params = {job: params[segments[job][0].index] for job in self.jobs}
        self.groups = {job: groups[segments[job][0].group] for job in self.jobs}
        self.rank = rule_of(ways, segments[self.jobs[0]][0]).rank  # a bucket's rules lay state out alike
        self.stacks = lay_out(ways, [(s, self.params[job]) for job in self.owned for s in segments[job]])
        self.metas = {
            s.key: state_alone(rule_of(ways, s), s, self.params[job], "meta")
            for job in self.jobs
            for s in segments[job]
        }
        p = self.params[self.jobs[0]]
        self.gradient = torch.empty(0, dtype=p.dtype, device=p.device)  # to make others of its dtype and device
        self.direction = torch.empty(0, dtype=state_dtype(p), device=p.device)
        self.gathered: set[int] = set()
        """The jobs that take part in the step."""

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Bucket.state`."""
        mine = {segment.key: stack.views(segment) for stack in self.stacks for segment in stack.segments}
        for job in self.jobs:
            owner = self.peers.ranks[self.plan.owners[job]]
            device = self.params[job].device.type
            for segment in self.segments[job]:
                here = mine.get(segment.key, {})
                state: dict[str, Tensor] = {
                    name: Owned.wrap(here.get(name), owner, like, "cpu" if like.is_cpu else device)
                    for name, like in self.metas[segment.key].items()
                }
                yield segment.index, state

    def gather(self, grads: Tensors, weights: Tensors | None) -> Generator[None, None, tuple[Pieces, Pieces | None]]:
        """See `Bucket.gather`."""
        of_grads = self._issue_gather(grads)
        of_weights = None if weights is None else self._issue_gather(weights)
        yield
        return self._wait_gather(*of_grads), None if of_weights is None else self._wait_gather(*of_weights)

    def statistics(
        self, captured: Mapping[int, Statistics]
    ) -> Generator[None, None, Mapping[tuple[int, int], Statistics]]:
        """See `Bucket.statistics`."""
        yield from ()
        if captured:
            raise RuntimeError("K-FAC's statistics are of one process: parameters that ranks share can't use them yet")
        return {}

    def scatter(self, directions: Sequence[Directions]) -> Generator[None, None, list[Move]]:
        """See `Bucket.scatter`."""
        made = {segment.key: (d, segment) for d in directions for segment in d.stack.segments}
        owned = [job for job in self.owned if job in self.gathered]
        wholes = {job: self._whole(job, made) for job in owned}
        factors = {job: self._factors(job, made) for job in owned if self.plan.jobs[job].factored}
        moves: list[Move] = []
        products: list[tuple[Transfer, Tensor, list[LowRank]]] = []  # those that this rank multiplies itself
        outgoing, incoming = self._by_rank()
        for transfer in self.outward:
            job, factored = transfer.job, transfer.factored
            if job not in self.gathered:
                continue
            if transfer.source == self.me:
                sent = _tensors(factors[job]) if factored else [wholes[job][self._in_whole(transfer)]]
                outgoing[transfer.target] += [*sent, self._updates(job, made)] if self._rounds(job) else sent
            if transfer.target == self.me:
                move = self._move(transfer)
                received = self._empty_factors(job) if factored else []
                incoming[transfer.source] += _tensors(received) if factored else [move.D]
                incoming[transfer.source] += [] if move.t is None else [move.t]
                moves.append(move)
                if factored:
                    products.append((transfer, move.D, received))
        exchange = AllToAll(self.peers, outgoing, incoming, self.direction)
        yield
        exchange.wait()
        for transfer, D, received in products:
            D.copy_(self._product(transfer.job, received)[self._in_whole(transfer)])
        return moves

    # Gather.

    def _issue_gather(self, tensors: Tensors) -> tuple[AllToAll, dict[int, Tensor]]:
        """Issue the exchange that brings shards to their owners, and return it with the tensors that it fills."""
        shards = {job: x for job in self.jobs if (x := tensors[self.segments[job][0].index]) is not None}
        wholes = {job: self.gradient.new_empty(self._shape(job)) for job in self.owned if job in shards}
        outgoing, incoming = self._by_rank()
        for transfer in self.inward:
            if transfer.job in shards and transfer.source == self.me:
                outgoing[transfer.target].append(shards[transfer.job][self._in_shard(transfer)])
            if transfer.job in shards and transfer.target == self.me:
                incoming[transfer.source].append(wholes[transfer.job][self._in_whole(transfer)])
        self.gathered = set(shards)
        return AllToAll(self.peers, outgoing, incoming, self.gradient), wholes

    def _wait_gather(self, exchange: AllToAll, wholes: Mapping[int, Tensor]) -> Pieces:
        exchange.wait()
        return {
            segment.key: segment.view.batch(self._cut(whole, job, segment), segment.piece)
            for job, whole in wholes.items()
            for segment in self.segments[job]
        }

    # Scatter.

    def _move(self, transfer: Transfer) -> Move:
        """Return the move of this rank's weights that a transfer is for; its direction and count are received."""
        p = self.params[transfer.job]
        D = self.direction.new_empty(transfer.rectangle.shape)
        t = self.direction.new_empty(1) if self._rounds(transfer.job) else None
        W = local(p)[self._in_shard(transfer)]
        whole = torch.empty(p.shape, device="meta")
        index = self.segments[transfer.job][0].index
        return Move(index, W, D, may_stay=True, t=t, in_whole=lambda: whole[transfer.rectangle.slices])

    def _rounds(self, job: int) -> bool:
        """Return whether weights are rounded by the count of updates, which only the owner knows."""
        return bool(self.groups[job]["stochastic_rounding"]) and self.gradient.dtype == torch.bfloat16

    def _updates(self, job: int, made: Made) -> Tensor:
        """Return the number of updates that the first matrix of a job has had, ``[1]``."""
        key = self.segments[job][0].key
        if key not in made:
            return self.direction.new_zeros(1)
        directions, segment = made[key]
        return directions.stack.t[segment.start].view(1)

    def _whole(self, job: int, made: Made) -> Tensor:
        """Return the directions of a job in the shape of its rectangle; NaN where no direction was made."""
        whole = self.direction.new_full(self._shape(job), torch.nan)
        for segment in self.segments[job]:
            if segment.key in made:
                directions, stacked = made[segment.key]
                self._cut(whole, job, segment).copy_(segment.view.unbatch(directions.of(stacked), segment.piece))
        return whole

    def _factors(self, job: int, made: Made) -> list[LowRank]:
        """Return the factors of a job's directions, piece by piece; NaN where no direction was made."""
        factors = self._empty_factors(job)
        for k, segment in enumerate(self.segments[job]):
            if segment.key in made:
                directions, stacked = made[segment.key]
                factors[k] = directions.factors_of(stacked)
        return factors

    def _empty_factors(self, job: int) -> list[LowRank]:
        """Return factors of a job's directions that are to be filled; unfilled, their NaN says that matrices stay."""
        found = []
        for segment in self.segments[job]:
            b, m, n = segment.shape
            r = self.rank(m, n)
            found.append(LowRank(self.direction.new_full((b, m, r), torch.nan), self.direction.new_zeros((b, n, r))))
        return found

    def _product(self, job: int, factors: Sequence[LowRank]) -> Tensor:
        """Return the directions of a job in the shape of its rectangle, from the factors of its pieces."""
        whole = self.direction.new_empty(self._shape(job))
        for segment, low_rank in zip(self.segments[job], factors, strict=True):
            self._cut(whole, job, segment).copy_(segment.view.unbatch(low_rank.product(), segment.piece))
        return whole

    # Where things are.

    def _shape(self, job: int) -> tuple[int, ...]:
        return self.plan.jobs[job].rectangle.shape

    def _in_whole(self, transfer: Transfer) -> tuple[slice, ...]:
        """Return the slices of a transfer in the tensor of its job."""
        return transfer.rectangle.within(self.plan.jobs[transfer.job].rectangle)

    def _in_shard(self, transfer: Transfer) -> tuple[slice, ...]:
        """Return the slices of a transfer in this rank's shard."""
        return transfer.rectangle.within(self.plan.jobs[transfer.job].layout.shards[self.me])

    def _cut(self, whole: Tensor, job: int, segment: Segment) -> Tensor:
        """Cut a segment's piece out of the tensor of its job, which is the piece itself if the job has one piece."""
        return whole if len(self.segments[job]) == 1 else segment.view.cut(whole, segment.piece)

    def _by_rank(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return empty lists of the tensors that are sent to each rank, and received from each rank."""
        return [[] for _ in self.peers.ranks], [[] for _ in self.peers.ranks]


def _tensors(factors: Sequence[LowRank]) -> list[Tensor]:
    """Return left and right factors in the order in which they are sent."""
    return [x for low_rank in factors for x in (low_rank.left, low_rank.right)]
