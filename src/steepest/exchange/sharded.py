"""The exchange between ranks: gradients are sent to the ranks that step them, and directions are sent back.

A matrix is stepped by one rank, its owner, which has all of its state. A `ShardedBucket` holds parameters that are sent
together. To gather, one ``all_to_all_single`` brings the shards of their gradients to the owners, which join them. To
scatter, one more brings each rank the directions of its own shards. DDP, FSDP2, HSDP and tensor parallelism differ in
the rectangle of a parameter that each rank holds, and in nothing else. Bytes are moved, never added, so the result is
that of one process, bit for bit. Statistics of a model's layers are the exception, which `averaging` is about.

A layer's bias is the last column of its weight's matrix. The bias has a job of its own, which follows the weight's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.exchange.all_to_all import AllToAll
from steepest.exchange.averaging import Averaging, Target
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
        """Take the jobs of one bucket of the plan; ``segments`` has the pieces of each job, or of the one it follows.

        Groups have options; ways and parameters are all, by the numbers in segments.
        """
        self.peers = peers
        self.me = peers.me
        self.plan = plan
        self.inward = plan.inward(bucket, self.me)
        self.outward = plan.outward(bucket, self.me)
        self.jobs = plan.buckets[bucket]
        self.biases = plan.followers(bucket)
        """The job of a layer's bias, by that of its weight."""
        self.weights = {bias: weight for weight, bias in self.biases.items()}
        self.leading = [job for job in self.jobs if job not in self.weights]
        self.owned = [job for job in self.leading if plan.owners[job] == self.me]
        self.pieces = {job: segments[job] for job in self.jobs}
        self.indices = {job: self._index(job) for job in self.jobs}
        self.params = {job: params[index] for job, index in self.indices.items()}
        self.groups = {job: groups[segments[job][0].group] for job in self.jobs}
        self.rank = rule_of(ways, segments[self.jobs[0]][0]).rank  # a bucket's rules lay state out alike
        self.stacks = lay_out(ways, [(s, self.params[job]) for job in self.owned for s in segments[job]])
        self.metas = {
            s.key: state_alone(rule_of(ways, s), s, self.params[job], "meta")
            for job in self.leading
            for s in segments[job]
        }
        p = self.params[self.jobs[0]]
        self.device = p.device
        self.gradient = torch.empty(0, dtype=p.dtype, device=p.device)  # to make others of its dtype and device
        self.direction = torch.empty(0, dtype=state_dtype(p), device=p.device)
        self.gathered: set[int] = set()
        """The jobs that take part in the step."""

    @property
    def segments(self) -> Sequence[Segment]:
        """See `Bucket.segments`."""
        return [segment for job in self.leading for segment in self.pieces[job]]

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Bucket.state`."""
        placed = {segment.key: (stack, segment) for stack in self.stacks for segment in stack.segments}
        for job in self.leading:
            for segment in self.pieces[job]:
                stack, here = placed.get(segment.key, (None, segment))
                metas = self.metas[segment.key]
                yield segment.index, self._shown(job, metas, {} if stack is None else stack.views(here))
                if segment.bias is not None:
                    step, clock = self.direction.new_empty(()), torch.empty((), dtype=torch.int64, device="cpu")
                    metas = {"step": step, "clock": clock}
                    yield segment.bias, self._shown(job, metas, {} if stack is None else stack.clocks(here))

    def _shown(self, job: int, metas: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, Tensor]:
        owner, device = self.peers.ranks[self.plan.owners[job]], self.params[job].device.type
        return {
            name: Owned.wrap(here.get(name), owner, like, "cpu" if like.is_cpu else device)
            for name, like in metas.items()
        }

    def gather(self, grads: Tensors, weights: Tensors | None) -> Generator[None, None, tuple[Pieces, Pieces | None]]:
        """See `Bucket.gather`."""
        of_grads = self._issue_gather(grads)
        self.gathered = {job for job in self.jobs if grads[self.indices[job]] is not None}
        of_weights = None if weights is None else self._issue_gather(weights)
        yield
        return self._wait_gather(*of_grads), None if of_weights is None else self._wait_gather(*of_weights)

    def statistics(
        self, captured: Mapping[int, Statistics | None]
    ) -> Generator[None, None, Mapping[tuple[int, int], Statistics]]:
        """See `Bucket.statistics`."""
        targets, mine = [], {}
        for job in self.leading if captured else ():
            for segment in self.pieces[job]:
                if segment.index in captured:
                    b, m, n = segment.shape
                    targets.append(Target(segment.key, self.plan.owners[job], (b, n, n), (b, m, m)))
                    here = captured[segment.index]
                    if here is not None:
                        part = segment.part(here)
                        mine[segment.key] = part.A, part.B
        if not targets:
            return {}
        exchange = Averaging(self.peers, targets, mine, self.direction)
        yield
        return {key: Statistics(A, B) for key, (A, B) in exchange.wait().items()}

    def scatter(self, directions: Sequence[Directions]) -> Generator[None, None, list[Move]]:
        """See `Bucket.scatter`."""
        made = {segment.key: (d, segment) for d in directions for segment in d.stack.segments}
        owned = [job for job in self.owned if not self._team(job).isdisjoint(self.gathered)]
        wholes = {member: x for job in owned for member, x in self._wholes(job, made).items()}
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
        shards = {job: x for job in self.jobs if (x := tensors[self.indices[job]]) is not None}
        wholes = {job: self.gradient.new_empty(self._shape(job)) for job in shards if self.plan.owners[job] == self.me}
        outgoing, incoming = self._by_rank()
        for transfer in self.inward:
            if transfer.job in shards and transfer.source == self.me:
                outgoing[transfer.target].append(shards[transfer.job][self._in_shard(transfer)])
            if transfer.job in shards and transfer.target == self.me:
                incoming[transfer.source].append(wholes[transfer.job][self._in_whole(transfer)])
        return AllToAll(self.peers, outgoing, incoming, self.gradient), wholes

    def _wait_gather(self, exchange: AllToAll, wholes: Mapping[int, Tensor]) -> Pieces:
        exchange.wait()
        pieces = {}
        for job in self.owned:
            if not self._team(job).isdisjoint(wholes):
                # The half of a layer that has no gradient counts as zero, and is not moved.
                whole, column = (
                    None if j is None else wholes[j] if j in wholes else self.gradient.new_zeros(self._shape(j))
                    for j in (job, self.biases.get(job))
                )
                assert whole is not None
                for segment in self.pieces[job]:
                    M = segment.view.batch(self._cut(whole, job, segment), segment.piece)
                    if segment.bias is not None:
                        assert column is not None
                        M = torch.cat([M, self._rows(column, job, segment).reshape(*M.shape[:-1], 1)], dim=-1)
                    pieces[segment.key] = M
        return pieces

    # Scatter.

    def _move(self, transfer: Transfer) -> Move:
        """Return the move of this rank's weights that a transfer is for; its direction and count are received."""
        p = self.params[transfer.job]
        D = self.direction.new_empty(transfer.rectangle.shape)
        t = self.direction.new_empty(1) if self._rounds(transfer.job) else None
        W = local(p)[self._in_shard(transfer)]
        whole = torch.empty(p.shape, device="meta")
        index = self.indices[transfer.job]
        return Move(index, W, D, may_stay=True, t=t, in_whole=lambda: whole[transfer.rectangle.slices])

    def _rounds(self, job: int) -> bool:
        """Return whether weights are rounded by the count of updates, which only the owner knows."""
        return bool(self.groups[job]["stochastic_rounding"]) and self.gradient.dtype == torch.bfloat16

    def _updates(self, job: int, made: Made) -> Tensor:
        """Return the number of updates that the first matrix of a job has had, ``[1]``."""
        key = self.pieces[job][0].key
        if key not in made:
            return self.direction.new_zeros(1)
        directions, segment = made[key]
        return directions.stack.t[segment.start].view(1)

    def _wholes(self, job: int, made: Made) -> dict[int, Tensor]:
        """Return the directions of a job, and of the bias with it, in their rectangles; NaN where none was made."""
        wholes = {member: self.direction.new_full(self._shape(member), torch.nan) for member in self._team(job)}
        for segment in self.pieces[job]:
            if segment.key in made:
                directions, stacked = made[segment.key]
                D = directions.of(stacked)
                if segment.bias is not None:
                    self._rows(wholes[self.biases[job]], job, segment).copy_(D[..., -1].reshape(-1))
                    D = D[..., :-1]
                self._cut(wholes[job], job, segment).copy_(segment.view.unbatch(D, segment.piece))
        return wholes

    def _factors(self, job: int, made: Made) -> list[LowRank]:
        """Return the factors of a job's directions, piece by piece; NaN where no direction was made."""
        factors = self._empty_factors(job)
        for k, segment in enumerate(self.pieces[job]):
            if segment.key in made:
                directions, stacked = made[segment.key]
                factors[k] = directions.factors_of(stacked)
        return factors

    def _empty_factors(self, job: int) -> list[LowRank]:
        """Return factors of a job's directions that are to be filled; unfilled, their NaN says that matrices stay."""
        found = []
        for segment in self.pieces[job]:
            b, m, n = segment.shape
            r = self.rank(m, n)
            found.append(LowRank(self.direction.new_full((b, m, r), torch.nan), self.direction.new_zeros((b, n, r))))
        return found

    def _product(self, job: int, factors: Sequence[LowRank]) -> Tensor:
        """Return the directions of a job in the shape of its rectangle, from the factors of its pieces."""
        whole = self.direction.new_empty(self._shape(job))
        for segment, low_rank in zip(self.pieces[job], factors, strict=True):
            self._cut(whole, job, segment).copy_(segment.view.unbatch(low_rank.product(), segment.piece))
        return whole

    # Where things are.

    def _index(self, job: int) -> int:
        """Return the number of a job's parameter."""
        if job not in self.weights:
            return self.pieces[job][0].index
        return next(segment.bias for segment in self.pieces[job] if segment.bias is not None)

    def _team(self, job: int) -> set[int]:
        """Return the job of a weight and, if the layer has a bias, the bias' job."""
        return {job, self.biases.get(job, job)}

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
        return whole if len(self.pieces[job]) == 1 else segment.view.cut(whole, segment.piece)

    def _rows(self, column: Tensor, job: int, segment: Segment) -> Tensor:
        """Cut the entries of a segment's rows out of the tensor of its bias, likewise."""
        return column if len(self.pieces[job]) == 1 else column[segment.view.blocks[segment.piece][0]]

    def _by_rank(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return empty lists of the tensors that are sent to each rank, and received from each rank."""
        return [[] for _ in self.peers.ranks], [[] for _ in self.peers.ranks]


def _tensors(factors: Sequence[LowRank]) -> list[Tensor]:
    """Return left and right factors in the order in which they are sent."""
    return [x for low_rank in factors for x in (low_rank.left, low_rank.right)]
