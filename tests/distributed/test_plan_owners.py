"""Plans: owners and buckets are balanced, errands lent, and no rank holds more than it may."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import MANY, few, job, jobs, plans, with_costs

from steepest.exchange.layout import Layout
from steepest.exchange.plan import make_plan

# Owners.

costs = st.lists(st.floats(0, 1e15), min_size=1, max_size=60)


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


def test_small_differences_are_not_worth_a_trip():
    """Below a tenth more than the mean nothing is lent; beyond, no more than brings a rank below it."""
    errands = tuple((f"e{k}", 4.0, 1) for k in range(5))
    almost, uneven = (make_plan(with_costs([100 + by, 100 - by], 2, errands=errands), 2) for by in (5, 20))
    assert almost.loans == ()
    assert almost.loads() == (105, 95)
    assert uneven.loads() == (108, 92)
    assert [loan.rank for loan in uneven.loans] == [1, 1, 1]


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
