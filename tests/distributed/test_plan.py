"""Plans: every entry moves as it should on any number of ranks; owners and buckets are balanced, and always alike."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.plan import Job, Loan, Plan, Transfer, make_plan

MANY = [64, 100, 1024, 4096]


def job(name: str, layout: Layout, window: Rectangle | None = None, cost: float = 1.0, **others) -> Job:
    return Job(name, layout, window or layout.whole, cost, **{"memory": 1, "itemsizes": (2, 4)} | others)


# What hypothesis draws.


@st.composite
def meshes(draw, world: int) -> tuple[int, ...]:
    """A mesh of so many ranks, of up to three dimensions."""
    mesh = []
    for _ in range(draw(st.integers(0, 2))):
        mesh.append(draw(st.sampled_from([d for d in range(1, min(world, 64) + 1) if world % d == 0])))
        world //= mesh[-1]
    return (*mesh, world)


@st.composite
def layouts(draw, world: int) -> Layout:
    """Whole, sharded, replicated in part, sharded twice on one dimension; some ranks may hold nothing."""
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    mesh = draw(meshes(world))
    cut = st.sampled_from([None, *range(len(shape))])
    return Layout.sharded(shape, mesh, [draw(cut) for _ in mesh])


@st.composite
def jobs(draw, world: int, most: int = 6) -> list[Job]:
    """Parameters and windows of parameters, in a few layouts."""
    shared = draw(st.lists(layouts(world), min_size=1, max_size=3))
    found = []
    for number in range(draw(st.integers(1, most))):
        layout = draw(st.sampled_from(shared))
        edges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in layout.shape]
        window = Rectangle(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))
        cost = draw(st.integers(0, 9))
        errands = draw(st.lists(st.floats(0, cost / 2), max_size=2))
        among = draw(st.one_of(st.just(()), st.tuples(st.integers(0, world - 1))))
        found.append(
            job(
                f"w{number}",
                layout,
                draw(st.sampled_from([layout.whole, window])),
                cost=cost,
                memory=draw(st.integers(0, 9)),
                bucket=draw(st.sampled_from(["a", "b"])),
                factored=draw(st.sampled_from([0, 5, 50])),
                errands=tuple((f"e{k}", share, 10) for k, share in enumerate(errands)),
                among=among,
            )
        )
    return found


@st.composite
def plans(draw, worlds=range(1, 14)) -> Plan:
    world = draw(st.sampled_from(worlds))
    return make_plan(draw(jobs(world)), world, bucket_bytes=draw(st.sampled_from([1, 500, 10**9])))


few = settings(max_examples=70, deadline=None)
very_few = settings(max_examples=12, deadline=None)


# What moves.


def check(plan: Plan) -> None:
    """Inward every entry of a window once, from a rank that has it to the owner; outward to each rank what it holds."""
    for bucket, members in enumerate(plan.buckets):
        inward, outward = plan.inward(bucket), plan.outward(bucket)
        assert {move.job for move in (*inward, *outward)} <= set(members)
        for j in members:
            job, owner = plan.jobs[j], plan.owners[j]
            moved = np.zeros(job.layout.shape, dtype=int)
            for move in (move for move in inward if move.job == j):
                assert move.target == owner
                assert move.part == move.part & job.held(move.source), "a rank sends what it has"
                moved[move.part.slices] += 1
            assert moved.sum() == job.window.size
            assert (moved[job.window.slices] == 1).all()
            sent = sorted((move.target, move.part) for move in outward if move.job == j and move.source == owner)
            assert len(sent) == sum(move.job == j for move in outward)
            held = [(rank, job.held(rank)) for rank in range(plan.world)]
            assert sent == [(rank, part) for rank, part in held if not part.empty]


@few
@given(plans())
def test_everything_moves_once(plan):
    check(plan)


@very_few
@given(plans(MANY))
def test_everything_moves_once_among_many(plan):
    check(plan)


@few
@given(plans(), st.data())
def test_a_rank_can_ask_for_its_own(plan, data):
    rank = data.draw(st.integers(0, plan.world - 1))
    for bucket in range(len(plan.buckets)):
        for moves in (plan.inward, plan.outward):
            assert moves(bucket, rank) == tuple(m for m in moves(bucket) if rank in (m.source, m.target))


@few
@given(plans())
def test_what_one_rank_packs_another_unpacks(plan):
    """A step by messages, one from rank to rank: owners put gradients together, everybody gets its part back."""
    ranks = range(plan.world)
    for bucket, members in enumerate(plan.buckets):
        wholes = {j: np.random.default_rng(j).random(plan.jobs[j].layout.shape) for j in members}
        for moves, mine in ((plan.inward, "source"), (plan.outward, "target")):
            seen = {(rank, j): np.full(wholes[j].shape, np.nan) for rank in ranks for j in members}
            sent = {rank: [m for m in moves(bucket, rank) if m.source == rank] for rank in ranks}
            for rank in ranks:
                assert [m.target for m in sent[rank]] == sorted(m.target for m in sent[rank]), "one message to each"
                received = [m for m in moves(bucket, rank) if m.target == rank]
                message = [wholes[m.job][m.part.slices] for other in ranks for m in sent[other] if m.target == rank]
                for move, x in zip(received, message, strict=True):
                    seen[rank, move.job][move.part.slices] = x
            for j in members:
                window = plan.jobs[j].window
                if mine == "source":
                    assert np.array_equal(seen[plan.owners[j], j][window.slices], wholes[j][window.slices])
                for rank in ranks if mine == "target" else ():
                    held = plan.jobs[j].held(rank).slices
                    assert np.array_equal(seen[rank, j][held], wholes[j][held])


# How much moves.


@few
@given(plans())
def test_traffic_is_what_transfers_add_up_to(plan):
    counted = [[0] * plan.world for _ in range(4)]
    for bucket in range(len(plan.buckets)):
        for moves, (sent, received), way in ((plan.inward, counted[:2], 0), (plan.outward, counted[2:], 1)):
            for m in moves(bucket):
                if m.source != m.target:
                    entries = plan.jobs[m.job].factored if m.factored else m.part.size
                    sent[m.source] += entries * plan.jobs[m.job].itemsizes[way]
                    received[m.target] += entries * plan.jobs[m.job].itemsizes[way]
    traffic = plan.traffic()
    found = [traffic.sent_in, traffic.received_in, traffic.sent_out, traffic.received_out]
    assert found == [tuple(row) for row in counted]
    assert traffic.sent(0) == counted[0][0] + counted[2][0]


@few
@given(plans())
def test_factors_travel_where_they_are_fewer(plan):
    for bucket in range(len(plan.buckets)):
        assert not any(m.factored for m in plan.inward(bucket))
        for m in plan.outward(bucket):
            factored = plan.jobs[m.job].factored
            assert m.factored == (m.source != m.target and 0 < factored < m.part.size)


@pytest.mark.parametrize("world", [8, 64])
@pytest.mark.parametrize(
    ("mesh", "placements", "inward", "outward"),
    [
        # entries that all ranks send, of P; what stays on its rank is not sent
        (lambda w: (w,), (None,), lambda w: 0, lambda w: w - 1),
        (lambda w: (w,), (0,), lambda w: 1 - 1 / w, lambda w: 1 - 1 / w),
        (lambda w: (w,), (1,), lambda w: 1 - 1 / w, lambda w: 1 - 1 / w),
        (lambda w: (4, w // 4), (0, 1), lambda w: 1 - 1 / w, lambda w: 1 - 1 / w),
        (lambda w: (w // 4, 4), (0, 0), lambda w: 1 - 1 / w, lambda w: 1 - 1 / w),
        (lambda w: (w // 4, 4), (None, 0), lambda w: 1 - 1 / 4, lambda w: w / 4 - 1 / 4),
        (lambda w: (4, w // 4), (0, None), lambda w: 1 - 1 / 4, lambda w: w / 4 - 1 / 4),
    ],
    ids=["ddp", "fsdp", "tp", "tp and fsdp", "fsdp twice", "hsdp", "hsdp, other mesh"],
)
def test_volumes(world, mesh, placements, inward, outward):
    """2P/W by FSDP and tensor parallelism, P by DDP, P/RS and P/S by HSDP; here times W, and exactly."""
    layout = Layout.sharded((256, 64), mesh(world), placements)
    plan = make_plan([job(f"w{k}", layout, itemsizes=(1, 1)) for k in range(2 * world)], world)
    P = 2 * world * layout.whole.size
    traffic = plan.traffic()
    assert traffic.sent_in == (P * inward(world) / world,) * world, "every rank sends as much"
    assert sum(traffic.sent_out) == P * outward(world)
    assert traffic.sent_in == traffic.received_in
    assert traffic.sent_out == traffic.received_out


def test_a_source_is_in_the_owners_replica():
    """Four replicas of two shards, beside each other: nothing moves inward between replicas."""
    layout = Layout.sharded((8, 8), mesh=(4, 2), placements=(None, 0))
    plan = make_plan([job(f"w{k}", layout) for k in range(8)], 8)
    assert {move.source // 2 - move.target // 2 for move in plan.inward(0)} == {0}


def test_whole_matrices_that_a_rank_has_anyway_stay_there():
    """Experts: each rank owns what it holds, and nothing is sent."""
    layout = Layout.sharded((8, 3, 5), mesh=(4,), placements=(0,))
    parts = [job(f"experts.{rank}", layout, part, among=(rank,)) for rank, part in enumerate(layout.parts)]
    plan = make_plan(parts, 4)
    assert plan.owners == (0, 1, 2, 3)
    assert {move.source - move.target for move in (*plan.inward(0), *plan.outward(0))} == {0}
    assert sum(map(sum, (plan.traffic().sent_in, plan.traffic().sent_out))) == 0


# Owners.

costs = st.lists(st.floats(0, 1e15), min_size=1, max_size=60)


def with_costs(values, world: int, **others) -> list[Job]:
    layout = Layout.replicated((2, 2), world)
    return [job(f"w{k:03}", layout, cost=cost, **others) for k, cost in enumerate(values)]


@few
@given(costs, st.one_of(st.integers(1, 20), st.sampled_from(MANY)))
def test_no_rank_has_much_more_to_do_than_it_must(values, world):
    """The dearest rank got its last job as the one with least to do: so it has at most the mean without it, and it."""
    plan = make_plan(with_costs(values, world), world)
    loads = plan.loads()
    slowest = loads.index(max(loads))
    last = min(plan.jobs[j].cost for j in plan.owned(slowest))
    assert max(loads) <= ((sum(values) - last) / world + last) * (1 + 1e-9)
    assert sum(loads) == pytest.approx(sum(values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_four_thirds_of_the_best(values, world):
    """Graham, 1969, against all assignments there are."""
    best = min(
        max(sum(v for v, owner in zip(values, owners, strict=True) if owner == rank) for rank in range(world))
        for owners in itertools.product(range(world), repeat=len(values))
    )
    assert max(make_plan(with_costs(values, world), world).loads()) <= (4 / 3 - 1 / (3 * world)) * best + 1e-9


@few
@given(st.integers(2, 9).flatmap(lambda world: st.tuples(jobs(world), st.just(world))), st.randoms())
def test_owners_do_not_depend_on_the_order_of_jobs(drawn, random):
    listed, world = drawn
    shuffled = random.sample(listed, len(listed))
    owners = [dict(zip((j.name for j in js), make_plan(js, world).owners, strict=True)) for js in (listed, shuffled)]
    assert owners[0] == owners[1]


@few
@given(plans())
def test_errands_make_no_rank_busier_than_the_busiest_was(plan):
    at_home = replace(plan, loans=())
    assert max(plan.loads()) <= max(at_home.loads()) * (1 + 1e-9)
    assert sum(plan.loads()) == pytest.approx(sum(at_home.loads()))
    assert len({(loan.job, loan.errand) for loan in plan.loans}) == len(plan.loans)
    assert all(loan.rank != plan.owners[loan.job] for loan in plan.loans)
    assert sum(plan.lent()) == 10 * len(plan.loans)


def test_idle_ranks_do_the_errands_of_busy_ones():
    """Two jobs of 20, of which 6 and 6 are errands, on six ranks: nobody has more than the 8 that must stay."""
    errands = (("L", 6.0, 100), ("R", 6.0, 100))
    plan = make_plan(with_costs([20, 20], 6, errands=errands), 6)
    assert plan.owners == (0, 1)
    assert plan.loads() == (8, 8, 6, 6, 6, 6)
    assert plan.lent() == (200, 200, 0, 0, 0, 0)
    two = make_plan(with_costs([20, 20], 2, errands=errands), 2)
    assert two.loans == (), "both have as much to do"
    three = make_plan(with_costs([20, 20], 3, errands=errands), 3)
    assert sorted(three.loads()) == [12, 14, 14]


def test_restricted_jobs_go_first_and_the_others_around_them():
    few_choices = with_costs([4, 3], 2, among=(0,))
    free = [replace(j, name=f"free{k}") for k, j in enumerate(with_costs([5, 2], 2))]
    assert make_plan([*free, *few_choices], 2).owners == (1, 1, 0, 0)


def test_what_ranks_have_to_do_anyway_is_reckoned_with():
    assert make_plan(with_costs([2, 2], 3), 3, loads=[1.0, 0.0, 9.0]).owners == (1, 0)
    assert make_plan(with_costs([2, 2], 3), 3, loads=[1.0, 0.0, 9.0]).loads() == (2, 2, 0)
    with pytest.raises(ValueError, match=r"loads=\[1.0\]: must be one for each of 2 ranks"):
        make_plan([], 2, loads=[1.0])


@few
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=20), st.integers(1, 5))
def test_no_rank_holds_more_than_the_cap(work, world):
    layout = Layout.replicated((2, 2), world)
    listed = [job(f"w{k}", layout, cost=c, memory=m) for k, (c, m) in enumerate(work)]
    biggest, total = max(m for _, m in work), sum(m for _, m in work)
    cap = max(biggest, math.ceil(4 / 3 * (total / world + biggest)))
    plan = make_plan(listed, world, memory_cap=cap)
    assert max(plan.memory()) <= cap
    assert sum(plan.memory()) == total
    assert make_plan(listed, world, memory_cap=total).owners == make_plan(listed, world).owners


def test_a_cap_can_turn_a_job_away_from_the_rank_that_has_least_to_do():
    layout = Layout.replicated((2, 2), 2)
    listed = [
        job("a", layout, cost=9, memory=1),
        job("b", layout, cost=2, memory=5),
        job("c", layout, cost=1, memory=5),
    ]
    assert make_plan(listed, 2).owners == (0, 1, 1)
    assert make_plan(listed, 2, memory_cap=6).owners == (0, 1, 0)
    listed.append(job("d", layout, cost=0.5, memory=1))
    assert make_plan(listed, 2, memory_cap=6).owners == (0, 1, 0, 1), "the next one fits there again"


def test_what_only_fits_by_size_is_packed_by_size():
    layout = Layout.replicated((2, 2), 2)
    listed = [job(f"w{k}", layout, cost=c, memory=m) for k, (c, m) in enumerate([(9, 1), (8, 1), (2, 4), (1, 2)])]
    assert sorted(make_plan(listed, 2, memory_cap=4).memory()) == [4, 4]


def test_a_cap_that_is_too_low_is_refused():
    with pytest.raises(
        ValueError, match=r"memory_cap=5: .*no assignment of 3 jobs to 2 ranks.* needs 6 bytes .*blocks"
    ):
        make_plan(with_costs([1, 2, 3], 2, memory=4), 2, memory_cap=5)
    with pytest.raises(ValueError, match=r"memory_cap=3: "):
        make_plan(with_costs([1], 2, memory=4, among=(1,)), 2, memory_cap=3)


# Buckets.


@few
@given(plans(), st.sampled_from([1, 100, 2000]))
def test_buckets(plan, limit):
    """Every job is in one; keys keep apart; no rank gathers more at a time than it may, or has to."""
    plan = make_plan(plan.jobs, plan.world, bucket_bytes=limit)
    assert sorted(j for bucket in plan.buckets for j in bucket) == list(range(len(plan.jobs)))
    for bucket in plan.buckets:
        assert list(bucket) == sorted(bucket)
        assert len({plan.jobs[j].bucket for j in bucket}) == 1
        for rank in range(plan.world):
            sizes = [plan.jobs[j].window.size * 4 for j in bucket if plan.owners[j] == rank]
            sizes = [size for size in sizes if size]
            assert sum(sizes) <= limit or len(sizes) == 1


def test_ranks_work_on_like_matrices_at_the_same_time():
    """Large and small ones alternate in the model; a bucket has one kind, so nobody waits."""
    layout = Layout.replicated((10, 10), 4)
    listed = [job(f"w{k:02}", layout, cost=(9.0, 1.0)[k % 2]) for k in range(16)]
    plan = make_plan(listed, 4, bucket_bytes=400)
    assert [{plan.jobs[j].cost for j in bucket} for bucket in plan.buckets] == [{9.0}, {9.0}, {1.0}, {1.0}]
    assert plan.lockstep() == max(plan.loads())


# The same everywhere.

CHANGES = {
    "cost": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], cost=3.0), *plan.jobs[1:])),
    "name": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], name="other"), *plan.jobs[1:])),
    "memory": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], memory=3), *plan.jobs[1:])),
    "itemsizes": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], itemsizes=(4, 2)), *plan.jobs[1:])),
    "bucket": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], bucket="other"), *plan.jobs[1:])),
    "factored": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], factored=3), *plan.jobs[1:])),
    "errands": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], errands=(("L", 1.0, 1),)), *plan.jobs[1:])),
    "loans": lambda plan: replace(plan, loans=(Loan(0, 0, 1),)),
    "among": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], among=(1,)), *plan.jobs[1:])),
    "window": lambda plan: replace(
        plan, jobs=(replace(plan.jobs[0], window=Rectangle((0, 0), (1, 2))), *plan.jobs[1:])
    ),
    "layout": lambda plan: replace(
        plan, jobs=(replace(plan.jobs[0], layout=Layout.sharded((2, 2), (2,), (0,))), *plan.jobs[1:])
    ),
    "order": lambda plan: replace(plan, jobs=plan.jobs[::-1]),
    "owner": lambda plan: replace(plan, owners=plan.owners[::-1]),
    "buckets": lambda plan: replace(plan, buckets=((1,), (0,))),
    "world": lambda plan: replace(plan, world=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_tells_plans_apart(change):
    plan = make_plan(with_costs([1, 2], 2), 2)
    assert plan.digest() == make_plan(with_costs([1, 2], 2), 2).digest()
    assert CHANGES[change](plan).digest() != plan.digest()


def test_the_digest_is_the_same_in_another_process():
    program = (
        "from steepest.exchange.plan import Job, Layout, make_plan\n"
        "l = Layout.sharded((5, 3), (2, 2), (0, 1))\n"
        "digest = make_plan([Job(n, l, l.whole, 2.0, 8, (2, 4), bucket='k', among=(1, 2)) for n in 'ab'], 4).digest()\n"
    )
    here: dict[str, str] = {}
    exec(program, here)
    command = [sys.executable, "-c", program + "print(digest)"]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert there.strip() == here["digest"]
    assert len(here["digest"]) == 64


# What is no plan.


def test_a_wrong_plan_is_seen():
    """The checks above, on plans that are wrong."""
    layout = Layout.sharded((6, 4), (3,), (0,))
    plan = make_plan([job("a", layout), job("b", layout)], 3)
    check(plan)

    class Shifted(Plan):
        def inward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
            first, *others = super().inward(bucket, rank)
            return (replace(first, part=replace(first.part, start=(first.part.start[0] + 1, 0))), *others)

    class Swapped(Plan):
        def outward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
            return replace(plan, owners=plan.owners[::-1]).outward(bucket, rank)

    for wrong in (Shifted, Swapped):
        with pytest.raises(AssertionError):
            check(wrong(plan.jobs, plan.world, plan.owners, plan.buckets))


def test_bad_jobs_are_refused():
    layout = Layout.replicated((2, 2), 2)
    with pytest.raises(ValueError, match=r"name='a': two jobs"):
        make_plan([job("a", layout), job("a", layout)], 2)
    with pytest.raises(ValueError, match=r"world=3: the layout of a is one of 2 ranks"):
        make_plan([job("a", layout)], 3)
    with pytest.raises(ValueError, match=r"among=\(2,\): a may only be owned by ranks 0 to 1"):
        make_plan([job("a", layout, among=(2,))], 2)
    with pytest.raises(ValueError, match=r"bucket_bytes=0: must be at least 1"):
        make_plan([job("a", layout)], 2, bucket_bytes=0)


@pytest.mark.parametrize(
    "parts",
    [
        [((0, 0), (2, 4)), ((3, 0), (1, 4))],
        [((0, 0), (3, 4)), ((2, 0), (2, 4))],
        [((0, 0), (2, 4)), ((2, 0), (3, 4))],
        [((0, 0), (2, 4))],
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],
        [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 4))],
        [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2))],
        [],
    ],
    ids=["a gap", "an overlap", "beyond the end", "a part", "a shift", "no grid", "a hole", "nothing"],
)
def test_parts_that_are_no_grid_are_refused(parts):
    with pytest.raises(ValueError, match=r"cells of a grid over a parameter of shape \[4, 4\]"):
        Layout((4, 4), tuple(Rectangle(*part) for part in parts))


@given(st.integers(0, 50), st.integers(1, 12))
def test_shards_are_those_of_torch(rows, ranks):
    theirs = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)] if rows else []
    ours = [part.shape[0] for part in Layout.sharded((rows, 3), (ranks,), (0,)).parts]
    assert ours == theirs + [0] * (ranks - len(theirs))


def test_nothing_to_plan():
    plan = make_plan([], 3)
    assert plan.buckets == ()
    assert plan.loads() == (0.0, 0.0, 0.0)
    assert plan.lockstep() == 0
