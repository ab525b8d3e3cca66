"""Who steps which matrix, and what moves between ranks for it: decided before anything is sent, on every rank alike.

A parameter may lie on the ranks of a process group in any way: whole on each, in shards, in shards of shards. A
`Layout` says in which rectangles. What one rank steps, a `Job`, is a window of a parameter: the whole of it, one of its
blocks, the experts that a rank holds anyway. A `Plan` gives every job an owner and puts jobs into buckets. For each
bucket, gradients move *inward* to the owners, the owners compute, and directions move *outward*, to whoever holds a
part. Layouts differ in their rectangles and in nothing else:

    elements that a rank sends, of P in all                     in          out
    whole on each of W ranks (DDP)                              0           P (W-1)/W
    sharded over W ranks (FSDP2, tensor parallel)               P/W         P/W         less what stays where it is
    sharded over S ranks, R such replicas (HSDP)                P/(RS)      P/S         likewise

Everything here is arithmetic of the standard library: no tensors, no communication. So a plan for thousands of ranks
can be looked at on one machine; ``steepest plan`` does.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from steepest.exchange.layout import Layout, Rectangle, fingerprint

__all__ = ["BUCKET_BYTES", "Job", "Layout", "Loan", "Plan", "Rectangle", "Traffic", "Transfer", "make_plan"]

BUCKET_BYTES = 128 * 2**20
"""What a rank gathers at a time. At 1024 ranks each pair then exchanges 128 KiB, below which latency would govern; and
where there is more than a few times that to gather, buckets are enough for communication to hide behind computation."""


UNEVEN = 1.1
"""By how much the busiest rank may exceed the mean before it lends errands: below that a trip is not worth it."""


@dataclass(frozen=True)
class Job:
    """What one rank steps: all matrices in a window of a parameter."""

    name: str
    """The parameter's, fully qualified, and the piece's number if it is a piece; no two jobs share one."""
    layout: Layout
    window: Rectangle
    """The part of the parameter that it is; ``layout.whole`` for all."""
    cost: float
    """FLOPs of a step."""
    memory: int
    """Bytes of state on its owner."""
    itemsizes: tuple[int, int]
    """Bytes per entry of what moves inward, gradients, and outward, directions."""
    errands: tuple[tuple[str, float, int], ...] = ()
    """Parts of it that another rank may do after the step: a name, FLOPs of a step, which are among ``cost``, and the
    bytes that it takes there and back whenever it is due. Refreshes of single factors are."""
    bucket: str = ""
    """Jobs that differ here never share a bucket: what can't be packed into one buffer, or is stepped apart."""
    factored: int = 0
    """Entries of its direction's factors, which travel wherever they are fewer than those of a part; 0: it has none."""
    among: tuple[int, ...] = ()
    """Ranks that may own it; none: any. For whole matrices that a rank holds anyway, as experts are."""

    def held(self, rank: int) -> Rectangle:
        """What a rank holds of the window; perhaps nothing."""
        return self.layout.parts[rank] & self.window

    def in_factors(self, part: Rectangle) -> bool:
        """Whether another rank that holds ``part`` gets the direction's factors, and multiplies them itself."""
        return 0 < self.factored < part.size

    def outward_entries(self, part: Rectangle) -> int:
        """What travels to another rank that holds ``part``."""
        return self.factored if self.in_factors(part) else part.size

    @property
    def shape(self) -> tuple[int, ...]:
        """What its owner fits together."""
        return self.window.shape


@dataclass(frozen=True)
class Transfer:
    """One rectangle from one rank to another, or to itself: then it is a copy."""

    job: int
    source: int
    target: int
    part: Rectangle
    """In the parameter's dimensions, within the job's window."""
    factored: bool = False
    """Whether the factors of the whole direction go instead."""


@dataclass(frozen=True)
class Loan:
    """An errand that another rank than the owner does."""

    job: int
    errand: int
    """Its number among the job's."""
    rank: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step, by rank; what stays on its rank is not in it."""

    sent_in: tuple[int, ...]
    received_in: tuple[int, ...]
    sent_out: tuple[int, ...]
    received_out: tuple[int, ...]

    def sent(self, rank: int) -> int:
        """Both ways."""
        return self.sent_in[rank] + self.sent_out[rank]


@dataclass(frozen=True)
class Plan:
    """Owners and buckets for jobs on ``world`` ranks; `make_plan` makes it."""

    jobs: tuple[Job, ...]
    world: int
    owners: tuple[int, ...]
    """By job."""
    buckets: tuple[tuple[int, ...], ...]
    """The jobs of each, ascending."""
    loans: tuple[Loan, ...] = ()
    """Errands that don't stay with their job's owner, in the order of jobs."""

    def inward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
        """Gradients of a bucket to their owners, every entry once; only those with ``rank`` at an end, if given.

        Sorted by source, target, job and place: what one rank packs for another is what that one unpacks.
        """
        found = []
        for j in self.buckets[bucket]:
            job, owner = self.jobs[j], self.owners[j]
            for part, holders in job.layout.meet(self._reach(j, rank)):
                source = job.layout.source(holders, owner)
                if rank in (None, owner, source):
                    found.append(Transfer(j, source, owner, part))
        return tuple(sorted(found, key=_order))

    def outward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
        """Directions of a bucket from their owners to everybody's part, sorted likewise."""
        found = []
        for j in self.buckets[bucket]:
            job, owner = self.jobs[j], self.owners[j]
            for part, holders in job.layout.meet(self._reach(j, rank)):
                found += [
                    Transfer(j, owner, target, part, target != owner and job.in_factors(part))
                    for target in holders
                    if rank in (None, owner, target)
                ]
        return tuple(sorted(found, key=_order))

    def _reach(self, j: int, rank: int | None) -> Rectangle:
        """The part of a job whose transfers may concern a rank."""
        return self.jobs[j].window if rank is None or rank == self.owners[j] else self.jobs[j].held(rank)

    def owned(self, rank: int) -> tuple[int, ...]:
        """The jobs of a rank, ascending."""
        return tuple(j for j, owner in enumerate(self.owners) if owner == rank)

    def loads(self) -> tuple[float, ...]:
        """FLOPs of a step, by rank."""
        loads = [0.0] * self.world
        for owner, job in zip(self.owners, self.jobs, strict=True):
            loads[owner] += job.cost
        for loan in self.loans:
            _, cost, _ = self.jobs[loan.job].errands[loan.errand]
            loads[self.owners[loan.job]] -= cost
            loads[loan.rank] += cost
        return tuple(loads)

    def lent(self) -> tuple[int, ...]:
        """Bytes that each rank sends or receives for errands of its own jobs, in a step in which all are due."""
        sizes = [0] * self.world
        for loan in self.loans:
            sizes[self.owners[loan.job]] += self.jobs[loan.job].errands[loan.errand][2]
        return tuple(sizes)

    def memory(self) -> tuple[int, ...]:
        """Bytes of state, by rank."""
        sizes = [0] * self.world
        for owner, job in zip(self.owners, self.jobs, strict=True):
            sizes[owner] += job.memory
        return tuple(sizes)

    def lockstep(self) -> float:
        """FLOPs from the first bucket to the last if every rank waits for the slowest after each."""
        worst = 0.0
        for bucket in self.buckets:
            loads: dict[int, float] = {}
            for j in bucket:
                loads[self.owners[j]] = loads.get(self.owners[j], 0.0) + self.jobs[j].cost
            worst += max(loads.values())
        return worst

    def traffic(self) -> Traffic:
        """What every rank sends and receives: counted job by job, not transfer by transfer, of which there are many."""
        sent_in, received_in, sent_out, received_out = ([0] * self.world for _ in range(4))
        kinds = [replace(job, name="", cost=0.0, memory=0, errands=(), bucket="", among=()) for job in self.jobs]
        alike = Counter((job, job.layout.replica(owner)) for owner, job in zip(self.owners, kinds, strict=True))
        outward: dict[Job, int] = {}  # entries that go to all ranks together
        for (job, replica), count in alike.items():
            cells = job.layout.meet(job.window)
            outward[job] = sum(job.outward_entries(part) * len(holders) for part, holders in cells)
            for part, holders in cells:
                sent_in[holders[replica % len(holders)]] += count * part.size * job.itemsizes[0]
                for rank in holders:
                    received_out[rank] += count * job.outward_entries(part) * job.itemsizes[1]
        for owner, job in zip(self.owners, kinds, strict=True):
            kept, back = job.held(owner).size, job.outward_entries(job.held(owner))
            sent_in[owner] -= kept * job.itemsizes[0]
            received_in[owner] += (job.window.size - kept) * job.itemsizes[0]
            sent_out[owner] += (outward[job] - back) * job.itemsizes[1]
            received_out[owner] -= back * job.itemsizes[1]
        return Traffic(tuple(sent_in), tuple(received_in), tuple(sent_out), tuple(received_out))

    def digest(self) -> str:
        """Equal on all ranks if their plans are, and only then."""
        facts = [
            (j.name, j.layout.digest, j.window, j.cost, j.memory, j.itemsizes, j.factored, j.errands, j.bucket, j.among)
            for j in self.jobs
        ]
        return fingerprint(self.world, self.owners, self.buckets, self.loans, *facts)


def make_plan(
    jobs: Iterable[Job],
    world: int,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    memory_cap: int | None = None,
    loads: Sequence[float] = (),
) -> Plan:
    """Give every job an owner, and put jobs into buckets. The same jobs give the same plan, in every process.

    Owners: dearest jobs first, each to the rank that has least to do so far (Graham, 1969: longest processing time
    first, at most 4/3 of the best there is). Names break ties. Jobs with few ranks to choose from go before the rest.

    Buckets: every rank brings its dearest jobs into the first bucket, the next dearest into the second, ... So all
    ranks work on like matrices at the same time, like shapes meet in one bucket, and nobody waits long for another.

    Errands: whoever has more to do than `UNEVEN` of the mean lends the dearest ones that another rank can do and still
    have less to do than itself. So nothing is lent where there are many matrices.

    Args:
        jobs: in the same order on every rank.
        world: ranks of the group.
        bucket_bytes: of what a rank gathers for a bucket; a job larger than that fills one alone.
        memory_cap: bytes of state that no rank may exceed.
        loads: FLOPs that each rank has to do anyway, as by another plan; none if left out.

    Raises:
        ValueError: for two jobs of one name, layouts, ranks or loads that don't fit the group, or if no assignment
            within ``memory_cap`` is found.

    >>> shapes = {"up": (8, 2), "down": (2, 8), "gate": (8, 2)}
    >>> layouts = {name: Layout.sharded(shape, mesh=(2,), placements=(0,)) for name, shape in shapes.items()}
    >>> plan = make_plan([Job(name, l, l.whole, 1.0, 64, (4, 4)) for name, l in layouts.items()], world=2)
    >>> plan.owners, plan.buckets
    ((0, 0, 1), ((0, 1, 2),))
    >>> plan.inward(0)[1]
    Transfer(job=1, source=0, target=0, part=Rectangle(start=(0, 0), shape=(1, 8)), factored=False)
    >>> plan.traffic().sent_in
    (32, 64)
    """
    jobs = tuple(jobs)
    loads = list(loads) or [0.0] * world
    _check(jobs, world, bucket_bytes, loads)
    order = sorted(range(len(jobs)), key=lambda j: (-jobs[j].cost, jobs[j].name))
    owners = _assign(jobs, order, loads, memory_cap)
    return Plan(jobs, world, owners, _fill(jobs, order, owners, bucket_bytes), _lend(jobs, owners, loads))


def _assign(jobs: Sequence[Job], order: Sequence[int], loads: Sequence[float], cap: int | None) -> tuple[int, ...]:
    """Owners by cost; by memory if those don't fit, which packs better and balances worse."""
    owners = _greedy(jobs, order, loads, cap, by_memory=False)
    if owners is None:
        largest = sorted(order, key=lambda j: -jobs[j].memory)
        owners = _greedy(jobs, largest, loads, cap, by_memory=True)
    if owners is None:
        world = len(loads)
        need = max(max(job.memory for job in jobs), -(-sum(job.memory for job in jobs) // world))
        raise ValueError(
            f"memory_cap={cap}: found no assignment of {len(jobs)} jobs to {world} ranks; some rank needs {need} bytes "
            "or more. Raise it, cut matrices into blocks, or use more ranks"
        )
    return owners


def _greedy(
    jobs: Sequence[Job], order: Sequence[int], loads: Sequence[float], cap: int | None, by_memory: bool
) -> tuple[int, ...] | None:
    """Each job to the rank with least so far that has room; None if there is none."""
    cost, memory = list(loads), [0] * len(loads)
    owners = [-1] * len(jobs)

    def filled(rank: int) -> tuple[float, float, int]:
        return (memory[rank], cost[rank], rank) if by_memory else (cost[rank], memory[rank], rank)

    def give(j: int, rank: int) -> None:
        owners[j] = rank
        cost[rank] += jobs[j].cost
        memory[rank] += jobs[j].memory

    def fits(j: int, rank: int) -> bool:
        return cap is None or memory[rank] + jobs[j].memory <= cap

    for j in (j for j in order if jobs[j].among):
        open_to = [filled(rank) for rank in jobs[j].among if fits(j, rank)]
        if not open_to:
            return None
        give(j, min(open_to)[-1])
    queue = [filled(rank) for rank in range(len(loads))]
    heapq.heapify(queue)
    for j in (j for j in order if not jobs[j].among):
        full = []
        while queue and not fits(j, queue[0][-1]):
            full.append(heapq.heappop(queue))
        if not queue:
            return None
        rank = queue[0][-1]
        give(j, rank)
        heapq.heapreplace(queue, filled(rank))
        for entry in full:
            heapq.heappush(queue, entry)
    return tuple(owners)


def _lend(jobs: Sequence[Job], owners: Sequence[int], loads: Sequence[float]) -> tuple[Loan, ...]:
    """Errands from the ranks that have most to do to those that have least, while that evens things out."""
    if not any(job.errands for job in jobs):
        return ()
    busy = list(loads)
    at_home: list[list[tuple[float, int, int]]] = [[] for _ in loads]  # by rank: what it could lend, dearest last
    for j, (job, owner) in enumerate(zip(jobs, owners, strict=True)):
        busy[owner] += job.cost
        at_home[owner] += [(cost, -j, -k) for k, (_, cost, _) in enumerate(job.errands)]
    for errands in at_home:
        errands.sort()
    bearable = UNEVEN * math.fsum(busy) / len(busy)
    idle = [(load, rank) for rank, load in enumerate(busy)]
    heapq.heapify(idle)
    loans = []
    # Those who lend keep the entry of what they had: more than all have who lend after them, so these never ask them.
    for rank in sorted(range(len(busy)), key=lambda rank: (-busy[rank], rank)):
        while at_home[rank] and busy[rank] > bearable:
            cost, j, k = at_home[rank].pop()
            load, target = idle[0]
            if load + cost >= busy[rank]:
                continue  # a cheaper one may do
            loans.append(Loan(-j, -k, target))
            busy[rank] -= cost
            busy[target] += cost
            heapq.heapreplace(idle, (busy[target], target))
    return tuple(sorted(loans, key=lambda loan: (loan.job, loan.errand)))


def _fill(jobs: Sequence[Job], order: Sequence[int], owners: Sequence[int], limit: int) -> tuple[tuple[int, ...], ...]:
    """Buckets of each key, filled by every rank in this order."""
    keys = list(dict.fromkeys(job.bucket for job in jobs))
    buckets: dict[tuple[int, int], list[int]] = {}
    filled: dict[tuple[int, int], tuple[int, int]] = {}  # by key and rank: the last bucket, and the bytes in it
    for j in order:
        key, size = keys.index(jobs[j].bucket), jobs[j].window.size * max(jobs[j].itemsizes)
        last, bytes_ = filled.get((key, owners[j]), (0, 0))
        if bytes_ and bytes_ + size > limit:
            last, bytes_ = last + 1, 0
        filled[key, owners[j]] = last, bytes_ + size
        buckets.setdefault((key, last), []).append(j)
    return tuple(tuple(sorted(buckets[place])) for place in sorted(buckets))


def _check(jobs: Sequence[Job], world: int, bucket_bytes: int, loads: Sequence[float]) -> None:
    if len(loads) != world:
        raise ValueError(f"loads={loads!r}: must be one for each of {world} ranks")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes={bucket_bytes}: must be at least 1")
    twice = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"name={twice[0]!r}: two jobs have it; a piece of a parameter needs a name of its own")
    for job in jobs:
        if job.layout.world != world:
            raise ValueError(f"world={world}: the layout of {job.name} is one of {job.layout.world} ranks")
        if any(not 0 <= rank < world for rank in job.among):
            raise ValueError(f"among={job.among}: {job.name} may only be owned by ranks 0 to {world - 1}")


def _order(transfer: Transfer) -> tuple[int, int, int, tuple[int, ...]]:
    return transfer.source, transfer.target, transfer.job, transfer.part.start
