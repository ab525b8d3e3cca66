"""Plans: every entry moves as it should on any number of ranks, and plans are always alike."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plans import MANY, job, large, plans, with_costs

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.plan import Plan, Transfer, make_plan

# What moves.


def check(plan: Plan) -> None:
    """Inward, every entry moves once, from a rank that has it to the owner; outward, to each rank what it holds."""
    for bucket, members in enumerate(plan.buckets):
        inward, outward = plan.inward(bucket), plan.outward(bucket)
        assert {move.job for move in (*inward, *outward)} <= set(members)
        for j in members:
            job, owner = plan.jobs[j], plan.owners[j]
            moved = np.zeros(job.layout.shape, dtype=int)
            for move in (move for move in inward if move.job == j):
                assert move.target == owner
                assert move.rectangle == move.rectangle & job.held(move.source), "a rank sends what it has"
                moved[move.rectangle.slices] += 1
            assert moved.sum() == job.rectangle.size
            assert (moved[job.rectangle.slices] == 1).all()
            sent = sorted((move.target, move.rectangle) for move in outward if move.job == j and move.source == owner)
            assert len(sent) == sum(move.job == j for move in outward)
            held = [(rank, job.held(rank)) for rank in range(plan.world)]
            assert sent == [(rank, part) for rank, part in held if not part.empty]


@given(plans())
def test_everything_moves_once(plan):
    check(plan)


@large
@given(plans(MANY))
def test_everything_moves_once_among_many(plan):
    check(plan)


@given(plans(), st.data())
def test_a_rank_can_ask_for_its_own(plan, data):
    rank = data.draw(st.integers(0, plan.world - 1))
    for bucket in range(len(plan.buckets)):
        for moves in (plan.inward, plan.outward):
            assert moves(bucket, rank) == tuple(m for m in moves(bucket) if rank in (m.source, m.target))


@given(plans())
def test_what_one_rank_packs_another_unpacks(plan):
    """Step by messages from rank to rank: owners join gradients, and every rank gets its part of the result."""
    ranks = range(plan.world)
    for bucket, members in enumerate(plan.buckets):
        wholes = {j: np.random.default_rng(j).random(plan.jobs[j].layout.shape) for j in members}
        for moves, mine in ((plan.inward, "source"), (plan.outward, "target")):
            seen = {(rank, j): np.full(wholes[j].shape, np.nan) for rank in ranks for j in members}
            sent = {rank: [m for m in moves(bucket, rank) if m.source == rank] for rank in ranks}
            for rank in ranks:
                assert [m.target for m in sent[rank]] == sorted(m.target for m in sent[rank]), "one message to each"
                received = [m for m in moves(bucket, rank) if m.target == rank]
                message = [
                    wholes[m.job][m.rectangle.slices] for other in ranks for m in sent[other] if m.target == rank
                ]
                for move, x in zip(received, message, strict=True):
                    seen[rank, move.job][move.rectangle.slices] = x
            for j in members:
                rectangle = plan.jobs[j].rectangle
                if mine == "source":
                    assert np.array_equal(seen[plan.owners[j], j][rectangle.slices], wholes[j][rectangle.slices])
                for rank in ranks if mine == "target" else ():
                    held = plan.jobs[j].held(rank).slices
                    assert np.array_equal(seen[rank, j][held], wholes[j][held])


# How much moves.


@given(plans())
def test_traffic_is_what_transfers_add_up_to(plan):
    counted = [[0] * plan.world for _ in range(4)]
    for bucket in range(len(plan.buckets)):
        for moves, (sent, received), way in ((plan.inward, counted[:2], 0), (plan.outward, counted[2:], 1)):
            for m in moves(bucket):
                if m.source != m.target:
                    entries = plan.jobs[m.job].factored if m.factored else m.rectangle.size
                    sent[m.source] += entries * plan.jobs[m.job].itemsizes[way]
                    received[m.target] += entries * plan.jobs[m.job].itemsizes[way]
    traffic = plan.traffic()
    found = [traffic.sent_in, traffic.received_in, traffic.sent_out, traffic.received_out]
    assert found == [tuple(row) for row in counted]
    assert traffic.sent(0) == counted[0][0] + counted[2][0]


@given(plans())
def test_factors_travel_where_they_are_fewer(plan):
    for bucket in range(len(plan.buckets)):
        assert not any(m.factored for m in plan.inward(bucket))
        for m in plan.outward(bucket):
            factored = plan.jobs[m.job].factored
            assert m.factored == (m.source != m.target and 0 < factored < m.rectangle.size)


@pytest.mark.parametrize("world", [8, 64])
@pytest.mark.parametrize(
    ("mesh", "placements", "inward", "outward"),
    [
        # entries that all ranks send, of P, without what stays on its rank
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
    """A rank sends 2P/W by FSDP and tensor parallelism, P by DDP, and P/RS and P/S by HSDP; here times W."""
    layout = Layout.sharded((256, 64), mesh(world), placements)
    plan = make_plan([job(f"w{k}", layout, itemsizes=(1, 1)) for k in range(2 * world)], world)
    P = 2 * world * layout.whole.size
    traffic = plan.traffic()
    assert traffic.sent_in == (P * inward(world) / world,) * world, "every rank sends as much"
    assert sum(traffic.sent_out) == P * outward(world)
    assert traffic.sent_in == traffic.received_in
    assert traffic.sent_out == traffic.received_out


def test_a_source_is_in_the_owners_replica():
    """With four replicas of two shards, nothing moves inward between replicas."""
    layout = Layout.sharded((8, 8), mesh=(4, 2), placements=(None, 0))
    plan = make_plan([job(f"w{k}", layout) for k in range(8)], 8)
    assert {move.source // 2 - move.target // 2 for move in plan.inward(0)} == {0}


# The same everywhere.

CHANGES = {
    "cost": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], cost=3.0), *plan.jobs[1:])),
    "name": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], name="other"), *plan.jobs[1:])),
    "memory": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], memory=3), *plan.jobs[1:])),
    "itemsizes": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], itemsizes=(4, 2)), *plan.jobs[1:])),
    "kind": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], kind="other"), *plan.jobs[1:])),
    "factored": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], factored=3), *plan.jobs[1:])),
    "leader": lambda plan: replace(plan, jobs=(replace(plan.jobs[0], leader=plan.jobs[1].name), *plan.jobs[1:])),
    "rectangle": lambda plan: replace(
        plan, jobs=(replace(plan.jobs[0], rectangle=Rectangle((0, 0), (1, 2))), *plan.jobs[1:])
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
        "from steepest.exchange.layout import Layout\n"
        "from steepest.exchange.plan import Job, make_plan\n"
        "l = Layout.sharded((5, 3), (2, 2), (0, 1))\n"
        "digest = make_plan([Job(n, l, l.whole, 2.0, 8, (2, 4), kind='k') for n in 'ab'], 4).digest()\n"
    )
    here: dict[str, str] = {}
    exec(program, here)
    command = [sys.executable, "-c", program + "print(digest)"]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert there.strip() == here["digest"]
    assert len(here["digest"]) == 64


# Wrong plans and bad input.


def test_a_wrong_plan_is_seen():
    """The checks above fail on plans that are wrong."""
    layout = Layout.sharded((6, 4), (3,), (0,))
    plan = make_plan([job("a", layout), job("b", layout)], 3)
    check(plan)

    class Shifted(Plan):
        def inward(self, bucket: int, rank: int | None = None) -> tuple[Transfer, ...]:
            first, *others = super().inward(bucket, rank)
            return (
                replace(first, rectangle=replace(first.rectangle, start=(first.rectangle.start[0] + 1, 0))),
                *others,
            )

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
    with pytest.raises(ValueError, match=r"world=3: the layout of a is for 2 ranks"):
        make_plan([job("a", layout)], 3)
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
    ours = [part.shape[0] for part in Layout.sharded((rows, 3), (ranks,), (0,)).shards]
    assert ours == theirs + [0] * (ranks - len(theirs))


def test_nothing_to_plan():
    plan = make_plan([], 3)
    assert plan.buckets == ()
    assert plan.loads() == (0.0, 0.0, 0.0)
    assert plan.lockstep() == 0
