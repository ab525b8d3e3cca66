"""Plans: which rank steps which matrices, and what ranks send for that.

Every rank makes the same plan by itself, before anything is sent. A parameter may lie on the ranks of a process group
in any way: whole on each, in shards, in shards of shards; its `Layout` says how. A `Job` is what one rank steps: a
rectangle of a parameter, which is the whole of it or one of its pieces. A `Plan` gives every job an owner, and puts
jobs into buckets. For each bucket, gradients move *inward* to the owners, the owners compute, and directions move
*outward* to every rank that holds a shard. Layouts differ in their rectangles and in nothing else:

    elements that a rank sends, of P in all                     in          out
    whole on each of W ranks (DDP)                              0           P (W-1)/W
    sharded over W ranks (FSDP2, tensor parallel)               P/W         P/W         less what stays where it is
    sharded over S ranks, R such replicas (HSDP)                P/(RS)      P/S         likewise

Everything here is arithmetic of the standard library, without tensors or communication. So a plan for thousands of
ranks can be examined on one machine, as ``steepest plan`` does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from steepest.exchange.layout import Layout, Rectangle, fingerprint

BUCKET_BYTES = 128 * 2**20
"""The most bytes that a rank gathers for one bucket. At 1024 ranks each pair then exchanges 128 KiB; with less, latency
would dominate. Where there is more than a few times that to gather, there are enough buckets for communication to hide
behind computation."""


@dataclass(frozen=True)
class Job:
    """A job is what one rank steps: all matrices in a rectangle of a parameter."""

    name: str
    """The parameter's qualified name, and the number of the piece if it is one piece; no two jobs share a name."""
    layout: Layout
    rectangle: Rectangle
    """The rectangle of the parameter that the job covers; ``layout.whole`` for all of it."""
    cost: float
    """FLOPs of a step."""
    memory: int
    """Bytes of state on the owner."""
    itemsizes: tuple[int, int]
    """Bytes per entry of gradients, which move inward, and of directions, which move outward."""
    kind: str = ""
    """Jobs of different kinds never share a bucket, because their tensors can't be packed into one buffer."""
    factored: int = 0
    """Entries of the factors of a low-rank direction, which are sent to ranks where they are fewer; 0: no factors."""
    leader: str = ""
    """The name of the job that this one follows, into its bucket and to its owner, as a layer's bias does its weight;
    "" for a job of its own."""

    def held(self, rank: int) -> Rectangle:
        """Return the part of the job's rectangle that a rank holds, which may be empty."""
        return self.layout.shards[rank] & self.rectangle

    def sends_factors(self, part: Rectangle) -> bool:
        """Return whether another rank, which holds ``part``, is sent the direction's factors and multiplies them."""
        return 0 < self.factored < part.size

    def outward_entries(self, part: Rectangle) -> int:
        """Return the number of entries that are sent to another rank, which holds ``part``."""
        return self.factored if self.sends_factors(part) else part.size


@dataclass(frozen=True)
class Transfer:
    """One rectangle that moves from one rank to another, or is copied if both are the same rank."""

    job: int
    source: int
    target: int
    rectangle: Rectangle
    """In the parameter's dimensions, within the job's rectangle."""
    factored: bool = False
    """Whether the factors of the job's whole direction are sent instead."""


@dataclass(frozen=True)
class Traffic:
    """The bytes that each rank sends and receives in one step; copies within a rank don't count."""

    sent_in: tuple[int, ...]
    received_in: tuple[int, ...]
    sent_out: tuple[int, ...]
    received_out: tuple[int, ...]

    def sent(self, rank: int) -> int:
        """Return the bytes that a rank sends, inward and outward."""
        return self.sent_in[rank] + self.sent_out[rank]


@dataclass(frozen=True)
class Plan:
    """Owners and buckets for jobs on ``world`` ranks, as `make_plan` makes them."""

    jobs: tuple[Job, ...]
    world: int
    owners: tuple[int, ...]
    """The owner of each job."""
    buckets: tuple[tuple[int, ...], ...]
    """The jobs of each bucket, ascending."""

    def inward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
        """Return the transfers of a bucket's gradients to the owners, which move every entry once.

        With ``rank``, only the transfers from or to that rank. They are sorted by source, target, job and position, so
        that a rank unpacks what another one packs.
        """
        found = []
        for j in self.buckets[bucket]:
            job, owner = self.jobs[j], self.owners[j]
            for part, holders in job.layout.cells(self._relevant(j, rank)):
                source = job.layout.source(holders, owner)
                if rank in (None, owner, source):
                    found.append(Transfer(j, source, owner, part))
        return tuple(sorted(found, key=_order))

    def outward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
        """Return the transfers of a bucket's directions from the owners to all shards; otherwise as `inward`."""
        found = []
        for j in self.buckets[bucket]:
            job, owner = self.jobs[j], self.owners[j]
            for part, holders in job.layout.cells(self._relevant(j, rank)):
                found += [
                    Transfer(j, owner, target, part, target != owner and job.sends_factors(part))
                    for target in holders
                    if rank in (None, owner, target)
                ]
        return tuple(sorted(found, key=_order))

    def followers(self, bucket: int) -> dict[int, int]:
        """Return the jobs of a bucket that follow others, by those that they follow."""
        places = {self.jobs[j].name: j for j in self.buckets[bucket]}
        return {places[self.jobs[j].leader]: j for j in self.buckets[bucket] if self.jobs[j].leader}

    def _relevant(self, j: int, rank: int | None) -> Rectangle:
        """Return the part of a job's rectangle whose transfers may concern a rank."""
        job = self.jobs[j]
        return job.rectangle if rank is None or rank == self.owners[j] else job.held(rank)

    def loads(self) -> tuple[float, ...]:
        """Return the FLOPs of a step of each rank."""
        loads = [0.0] * self.world
        for owner, job in zip(self.owners, self.jobs, strict=True):
            loads[owner] += job.cost
        return tuple(loads)

    def memory(self) -> tuple[int, ...]:
        """Return the bytes of state of each rank."""
        sizes = [0] * self.world
        for owner, job in zip(self.owners, self.jobs, strict=True):
            sizes[owner] += job.memory
        return tuple(sizes)

    def lockstep(self) -> float:
        """Return the FLOPs from the first bucket to the last if every rank waits for the slowest after each."""
        worst = 0.0
        for bucket in self.buckets:
            loads: dict[int, float] = {}
            for j in bucket:
                loads[self.owners[j]] = loads.get(self.owners[j], 0.0) + self.jobs[j].cost
            worst += max(loads.values())
        return worst

    def traffic(self) -> Traffic:
        """Return what every rank sends and receives in a step.

        It is counted by jobs that are alike, because there are many transfers.
        """
        sent_in, received_in, sent_out, received_out = ([0] * self.world for _ in range(4))
        alike = [replace(job, name="", cost=0.0, memory=0, kind="", leader="") for job in self.jobs]
        counts = Counter((job, job.layout.replica(owner)) for owner, job in zip(self.owners, alike, strict=True))
        outward: dict[Job, int] = {}  # entries that move to all ranks together
        for (job, replica), count in counts.items():
            cells = job.layout.cells(job.rectangle)
            outward[job] = sum(job.outward_entries(part) * len(holders) for part, holders in cells)
            for part, holders in cells:
                sent_in[holders[replica % len(holders)]] += count * part.size * job.itemsizes[0]
                for rank in holders:
                    received_out[rank] += count * job.outward_entries(part) * job.itemsizes[1]
        for owner, job in zip(self.owners, alike, strict=True):
            kept, own = job.held(owner).size, job.outward_entries(job.held(owner))
            sent_in[owner] -= kept * job.itemsizes[0]
            received_in[owner] += (job.rectangle.size - kept) * job.itemsizes[0]
            sent_out[owner] += (outward[job] - own) * job.itemsizes[1]
            received_out[owner] -= own * job.itemsizes[1]
        return Traffic(tuple(sent_in), tuple(received_in), tuple(sent_out), tuple(received_out))

    def digest(self) -> str:
        """Return a digest that is the same on all ranks if and only if their plans are."""
        facts = [
            (j.name, j.layout.digest, j.rectangle, j.cost, j.memory, j.itemsizes, j.factored, j.kind, j.leader)
            for j in self.jobs
        ]
        return fingerprint(self.world, self.owners, self.buckets, *facts)


def make_plan(
    jobs: Iterable[Job], world: int, *, bucket_bytes: int = BUCKET_BYTES, loads: Sequence[float] = ()
) -> Plan:
    """Give every job an owner, and put jobs into buckets. The same jobs give the same plan, in every process.

    Owners: the most expensive jobs come first, and each goes to the least loaded rank so far (Graham, 1969: longest
    processing time first, at most 4/3 of the best there is). Names break ties. A job that follows another one goes
    where that goes.

    Buckets: every rank puts its most expensive jobs into the first bucket, the next most expensive into the second, and
    so on. So all ranks work on similar matrices at the same time, matrices of one shape meet in one bucket, and no rank
    waits long for another.

    Args:
        jobs: in the same order on every rank.
        world: the number of ranks of the group.
        bucket_bytes: the most that a rank gathers for a bucket; a larger job fills a bucket alone.
        loads: FLOPs that each rank has to do besides, for example by another plan; zero if left out.

    Raises:
        ValueError: for two jobs of one name, for a leader that is none, and for layouts or loads that don't fit the
            group.

    >>> shapes = {"up": (8, 2), "down": (2, 8), "gate": (8, 2)}
    >>> layouts = {name: Layout.sharded(shape, mesh=(2,), placements=(0,)) for name, shape in shapes.items()}
    >>> plan = make_plan([Job(name, l, l.whole, 1.0, 64, (4, 4)) for name, l in layouts.items()], world=2)
    >>> plan.owners, plan.buckets
    ((0, 0, 1), ((0, 1, 2),))
    >>> plan.inward(0)[1]
    Transfer(job=1, source=0, target=0, rectangle=Rectangle(start=(0, 0), shape=(1, 8)), factored=False)
    >>> plan.traffic().sent_in
    (32, 64)
    """
    jobs = tuple(jobs)
    loads = list(loads) or [0.0] * world
    _check(jobs, world, bucket_bytes, loads)
    teams = _teams(jobs)
    owners = _assign(jobs, teams, loads)
    return Plan(jobs, world, owners, _fill(jobs, teams, owners, bucket_bytes))


def _teams(jobs: Sequence[Job]) -> list[list[int]]:
    """Return the jobs that go together, each leader with those that follow it; the most expensive team comes first."""
    teams = {job.name: [j] for j, job in enumerate(jobs) if not job.leader}
    for j, job in enumerate(jobs):
        if job.leader:
            teams[job.leader].append(j)
    return sorted(teams.values(), key=lambda team: (-sum(jobs[j].cost for j in team), jobs[team[0]].name))


def _assign(jobs: Sequence[Job], teams: Sequence[Sequence[int]], loads: Sequence[float]) -> tuple[int, ...]:
    """Give each team, in this order, to the rank with the least cost so far; memory and then number break ties."""
    owners = [-1] * len(jobs)
    ranks = [(load, 0, rank) for rank, load in enumerate(loads)]
    heapq.heapify(ranks)
    for team in teams:
        cost, memory, rank = ranks[0]
        for j in team:
            owners[j] = rank
            cost, memory = cost + jobs[j].cost, memory + jobs[j].memory
        heapq.heapreplace(ranks, (cost, memory, rank))
    return tuple(owners)


def _fill(
    jobs: Sequence[Job], teams: Sequence[Sequence[int]], owners: Sequence[int], limit: int
) -> tuple[tuple[int, ...], ...]:
    """Return the buckets of each kind, which every rank fills in this order."""
    kinds = list(dict.fromkeys(job.kind for job in jobs))
    buckets: dict[tuple[int, int], list[int]] = {}
    filled: dict[tuple[int, int], tuple[int, int]] = {}  # by kind and rank: the last bucket, and the bytes in it
    for team in teams:
        kind, owner = kinds.index(jobs[team[0]].kind), owners[team[0]]
        size = sum(jobs[j].rectangle.size * max(jobs[j].itemsizes) for j in team)
        last, bytes_ = filled.get((kind, owner), (0, 0))
        if bytes_ and bytes_ + size > limit:
            last, bytes_ = last + 1, 0
        filled[kind, owner] = last, bytes_ + size
        buckets.setdefault((kind, last), []).extend(team)
    return tuple(tuple(sorted(buckets[key])) for key in sorted(buckets))


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
            raise ValueError(f"world={world}: the layout of {job.name} is for {job.layout.world} ranks")
    leaders = {job.name: job for job in jobs if not job.leader}
    for job in jobs:
        if job.leader and job.leader not in leaders:
            raise ValueError(f"leader={job.leader!r} of {job.name}: must be a job that follows none")
        if job.leader and job.kind != leaders[job.leader].kind:
            raise ValueError(
                f"{job.name} ({job.kind}) and {job.leader} ({leaders[job.leader].kind}) can't share a bucket: must be "
                "of one dtype and on one device"
            )


def _order(transfer: Transfer) -> tuple[int, int, int, tuple[int, ...]]:
    return transfer.source, transfer.target, transfer.job, transfer.rectangle.start
