"""The exchange between ranks: gradients travel to the ranks that step them, directions travel back.

A matrix is stepped by one rank, its owner, which has its whole state. A `Shared` lot holds parameters that travel
together: one ``all_to_all_single`` brings the parts of their gradients to the owners, who fit them together (*gather*),
and one takes the owners' directions apart and brings every rank those of the parts that it holds (*spread*). DDP,
FSDP2, HSDP and tensor parallelism differ in which rank holds which box of a parameter, and in nothing else. Bytes are
moved, never added, so the result is that of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.exchange.compat import Owned
from steepest.exchange.domain import Domain
from steepest.exchange.layout import Rectangle
from steepest.exchange.lending import Lent, borrowed
from steepest.exchange.lot import Directions, Lot, Move, Tensors
from steepest.exchange.placement import local
from steepest.exchange.plan import Plan, Transfer
from steepest.exchange.shipment import Shipment
from steepest.rule import LowRank, Rule
from steepest.stack.stack import Answers, Seat, Stack, Windows, lay_out, state_dtype


class Shared(Lot):
    """The jobs of one bucket of a plan."""

    domain: Domain
    travels = True

    def __init__(
        self,
        rule: Rule,
        number: int,
        group: Mapping[str, Any],
        domain: Domain,
        plan: Plan,
        bucket: int,
        seats: Sequence[Sequence[Seat]],
    ) -> None:
        """Take the jobs of one bucket of what all ranks have planned; each job has its pieces in ``seats``."""
        self.group = number
        self.options = group
        self.rank = rule.rank
        self.domain = domain
        self.plan = plan
        self.inward = plan.inward(bucket, domain.me)
        self.outward = plan.outward(bucket, domain.me)
        self.jobs = plan.buckets[bucket]
        self.mine = [job for job in self.jobs if plan.owners[job] == domain.me]
        self.seats = {job: seats[job] for job in self.jobs}
        self.params = {job: group["params"][seats[job][0].index] for job in self.jobs}
        self.stacks = lay_out(rule, number, [(seat, self.params[job]) for job in self.mine for seat in seats[job]])
        self.blanks = {
            job: [(seat, Stack.blank(rule, number, seat, self.params[job])) for seat in seats[job]] for job in self.jobs
        }
        p = self.params[self.jobs[0]]
        self.of_gradients = torch.empty(0, dtype=p.dtype, device=p.device)
        self.of_directions = torch.empty(0, dtype=state_dtype(p), device=p.device)
        self.travelling: set[int] = set()
        self.lent = self._loans(rule)

    def state(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Lot.state`."""
        mine = {seat.key: stack.views(seat) for stack in self.stacks for seat in stack.seats}
        for job in self.jobs:
            owner = self.domain.ranks[self.plan.owners[job]]
            device = self.params[job].device.type
            for seat, blank in self.blanks[job]:
                here = mine.get(seat.key, {})
                yield (
                    seat.index,
                    {
                        name: Owned.wrap(here.get(name), owner, like, "cpu" if like.is_cpu else device)
                        for name, like in blank.views(seat).items()
                    },
                )

    def gather(self, tensors: Tensors) -> Callable[[], Windows]:
        """See `Lot.gather`."""
        shards = {job: x for job, seats in self.seats.items() if (x := tensors[seats[0].index]) is not None}
        wholes = {job: self.of_gradients.new_empty(self._window(job).shape) for job in self.mine if job in shards}
        outgoing, incoming = self._sides()
        for transfer in self.inward:
            job = transfer.job
            if job in shards and transfer.source == self.domain.me:
                outgoing[transfer.target].append(shards[job][self._in_shard(transfer)])
            if job in shards and transfer.target == self.domain.me:
                incoming[transfer.source].append(wholes[job][self._in_window(transfer)])
        self.travelling = set(shards)
        shipment = Shipment(self.domain, outgoing, incoming, self.of_gradients)

        def arrive() -> Windows:
            shipment.unload()
            return {
                seat.key: _window(whole, seat, self.seats[job])
                for job, whole in wholes.items()
                for seat in self.seats[job]
            }

        return arrive

    def spread(self, directions: Sequence[Directions]) -> Callable[[], list[Move]]:
        """See `Lot.spread`."""
        made = {seat.key: (d, seat) for d in directions for seat in d.stack.seats}
        wholes = {job: self._whole(job, made) for job in self.mine if job in self.travelling}
        factors = {job: self._factors(job, made) for job in wholes if self.plan.jobs[job].factored}
        ages = {job: self._age(job, made) for job in wholes} if self._rounds() else {}
        moves: list[Move] = []
        products: list[tuple[Transfer, Tensor, list[LowRank]]] = []  # what this rank multiplies itself
        outgoing, incoming = self._sides()
        for transfer in self.outward:
            job = transfer.job
            if job in self.travelling and transfer.source == self.domain.me:
                part = [wholes[job][self._in_window(transfer)]]
                outgoing[transfer.target] += _both(factors[job]) if transfer.factored else part
                outgoing[transfer.target] += [ages[job]] if ages else []
            if job in self.travelling and transfer.target == self.domain.me:
                move = self._move(transfer)
                blanks = self._blank_factors(job) if transfer.factored else []
                incoming[transfer.source] += _both(blanks) or [move.D]
                incoming[transfer.source] += [move.t] if move.t is not None else []
                moves.append(move)
                products += [(transfer, move.D, blanks)] if blanks else []
        shipment = Shipment(self.domain, outgoing, incoming, self.of_directions)

        def land() -> list[Move]:
            shipment.unload()
            for transfer, D, filled in products:
                D.copy_(self._product(transfer.job, filled)[self._in_window(transfer)])
            return moves

        return land

    def borrowed(self, rule: Rule) -> Generator[None, None, Answers]:
        """See `Lot.borrowed`."""
        return (yield from borrowed(rule, self.domain, self.lent, self.of_directions))

    def _loans(self, rule: Rule) -> list[Lent]:
        """What owners of this bucket's jobs lend out. A job has errands only if it is one piece."""
        placed = {seat.key: (seat, stack) for stack in self.stacks for seat in stack.seats}
        found = []
        for loan in self.plan.loans:
            if loan.job in self.jobs:
                (loose,) = self.seats[loan.job]
                _, m, n = loose.view.pieces[loose.piece]
                name, _, _ = self.plan.jobs[loan.job].errands[loan.errand]
                seat, stack = placed.get(loose.key, (loose, None))
                owner = self.plan.owners[loan.job]
                found.append(Lent(name, rule.errands(m, n)[name], seat, stack, owner, loan.rank))
        return found

    def _move(self, transfer: Transfer) -> Move:
        """How this rank's part moves that a transfer is for; the direction, and the age, come with the shipment."""
        p = self.params[transfer.job]
        D = self.of_directions.new_empty(transfer.part.shape)
        t = self.of_directions.new_empty(1) if self._rounds() else None
        W = local(p)[self._in_shard(transfer)]
        whole = torch.empty(p.shape, device="meta")
        index = self.seats[transfer.job][0].index
        return Move(index, W, D, may_stay=True, t=t, place=lambda: whole[transfer.part.slices])

    def _rounds(self) -> bool:
        """Whether weights are rounded in a way that depends on their age, which only the owner knows."""
        return bool(self.options["stochastic_rounding"]) and self.of_gradients.dtype == torch.bfloat16

    def _age(self, job: int, made: Mapping[tuple[int, int], tuple[Directions, Seat]]) -> Tensor:
        """``[1]``: how many updates the first matrix of a job has had."""
        key = self.seats[job][0].key
        if key not in made:
            return self.of_directions.new_zeros(1)
        directions, seat = made[key]
        return directions.stack.t[seat.start].view(1)

    def _whole(self, job: int, made: Mapping[tuple[int, int], tuple[Directions, Seat]]) -> Tensor:
        """The directions of a job that this rank owns, in the shape of its window; NaN where nothing was made."""
        whole = self.of_directions.new_full(self._window(job).shape, torch.nan)
        for seat in self.seats[job]:
            if seat.key in made:
                directions, placed = made[seat.key]
                shaped = placed.view.shaped(directions.marked(placed), placed.piece)
                _window(whole, seat, self.seats[job]).copy_(shaped)
        return whole

    def _factors(self, job: int, made: Mapping[tuple[int, int], tuple[Directions, Seat]]) -> list[LowRank]:
        """The factors of a job's directions, piece by piece; NaN where nothing was made."""
        factors = self._blank_factors(job)
        for k, seat in enumerate(self.seats[job]):
            if seat.key in made:
                directions, placed = made[seat.key]
                factors[k] = directions.factors(placed)
        return factors

    def _blank_factors(self, job: int) -> list[LowRank]:
        """Factors of a job's directions, to be filled; unfilled, they say that its matrices stay."""
        shapes = [seat.view.pieces[seat.piece] for seat in self.seats[job]]
        ranks = [self.rank(m, n) for _, m, n in shapes]
        x = self.of_directions
        return [
            LowRank(x.new_full((b, m, r), torch.nan), x.new_zeros((b, n, r)))
            for (b, m, n), r in zip(shapes, ranks, strict=True)
        ]

    def _product(self, job: int, factors: Sequence[LowRank]) -> Tensor:
        """The directions of a job in the shape of its window, from the factors of its pieces."""
        whole = self.of_directions.new_empty(self._window(job).shape)
        for seat, low_rank in zip(self.seats[job], factors, strict=True):
            _window(whole, seat, self.seats[job]).copy_(seat.view.shaped(low_rank.product(), seat.piece))
        return whole

    def _window(self, job: int) -> Rectangle:
        return self.plan.jobs[job].window

    def _in_window(self, transfer: Transfer) -> tuple[slice, ...]:
        return transfer.part.within(self._window(transfer.job))

    def _in_shard(self, transfer: Transfer) -> tuple[slice, ...]:
        return transfer.part.within(self.plan.jobs[transfer.job].layout.parts[self.domain.me])

    def _sides(self) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        return [[] for _ in self.domain.ranks], [[] for _ in self.domain.ranks]


def _window(whole: Tensor, seat: Seat, seats: Sequence[Seat]) -> Tensor:
    """What a seat's piece covers of its job's tensor, which is the piece itself if it is the only one."""
    return whole if len(seats) == 1 else seat.view.window(whole, seat.piece)


def _both(factors: Sequence[LowRank]) -> list[Tensor]:
    """Left and right factors, in the order in which they travel."""
    return [x for low_rank in factors for x in (low_rank.left, low_rank.right)]
