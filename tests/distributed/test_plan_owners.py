"""Plans: owners and buckets are balanced."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import MANY, job, jobs, plans, with_costs

from steepest.exchange.layout import Layout
from steepest.exchange.plan import make_plan

# Owners.

costs = st.lists(st.floats(0, 1e15), min_size=1, max_size=60)


@given(costs, st.one_of(st.integers(1, 20), st.sampled_from(MANY)))
def test_no_rank_has_much_more_to_do_than_it_must(values, world):
    """The slowest rank was the least loaded when it got its last job, so it has at most that job more than the mean."""
    plan = make_plan(with_costs(values, world), world)
    loads = plan.loads()
    slowest = loads.index(max(loads))
    last = min(job.cost for job, owner in zip(plan.jobs, plan.owners, strict=True) if owner == slowest)
    assert max(loads) <= ((sum(values) - last) / world + last) * (1 + 1e-9)
    assert sum(loads) == pytest.approx(sum(values))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_four_thirds_of_the_best(values, world):
    """The bound of Graham, 1969, holds against all possible assignments."""
    best = min(
        max(sum(v for v, owner in zip(values, owners, strict=True) if owner == rank) for rank in range(world))
        for owners in itertools.product(range(world), repeat=len(values))
    )
    assert max(make_plan(with_costs(values, world), world).loads()) <= (4 / 3 - 1 / (3 * world)) * best + 1e-9


@given(st.integers(2, 9).flatmap(lambda world: st.tuples(jobs(world), st.just(world))), st.randoms())
def test_owners_do_not_depend_on_the_order_of_jobs(drawn, random):
    listed, world = drawn
    shuffled = random.sample(listed, len(listed))
    owners = [dict(zip((j.name for j in js), make_plan(js, world).owners, strict=True)) for js in (listed, shuffled)]
    assert owners[0] == owners[1]


def test_other_loads_of_ranks_count():
    assert make_plan(with_costs([2, 2], 3), 3, loads=[1.0, 0.0, 9.0]).owners == (1, 0)
    assert make_plan(with_costs([2, 2], 3), 3, loads=[1.0, 0.0, 9.0]).loads() == (2, 2, 0)
    with pytest.raises(ValueError, match=r"loads=\[1.0\]: must be one for each of 2 ranks"):
        make_plan([], 2, loads=[1.0])


# Buckets.


@given(plans(), st.sampled_from([1, 100, 2000]))
def test_buckets(plan, limit):
    """Every job is in one bucket, kinds are kept apart, and no rank gathers more than the limit or one job's team."""
    plan = make_plan(plan.jobs, plan.world, bucket_bytes=limit)
    assert sorted(j for bucket in plan.buckets for j in bucket) == list(range(len(plan.jobs)))
    for bucket in plan.buckets:
        assert list(bucket) == sorted(bucket)
        assert len({plan.jobs[j].kind for j in bucket}) == 1
        for rank in range(plan.world):
            here = [plan.jobs[j] for j in bucket if plan.owners[j] == rank and plan.jobs[j].rectangle.size]
            assert sum(job.rectangle.size * 4 for job in here) <= limit or len({j.leader or j.name for j in here}) == 1


@given(plans())
def test_followers_go_where_their_leaders_go(plan):
    at = {j: bucket for bucket, members in enumerate(plan.buckets) for j in members}
    places = {job.name: (plan.owners[j], at[j]) for j, job in enumerate(plan.jobs)}
    assert all(places[job.name] == places[job.leader] for job in plan.jobs if job.leader)


def test_followers_fill_buckets_and_load_ranks_with_their_leaders():
    layout = Layout.replicated((10, 10), 2)
    listed = [job(name, layout, cost=cost) for name, cost in (("a", 2.0), ("b", 3.0), ("c", 4.0))]
    assert make_plan(listed, 2).owners == (1, 1, 0)
    plan = make_plan([*listed, job("a's", layout, cost=9.0, leader="a")], 2, bucket_bytes=800)
    assert plan.owners == (0, 1, 1, 0)
    assert plan.loads() == (11, 7)
    assert plan.buckets == ((0, 1, 2, 3),)
    with pytest.raises(ValueError, match=r"leader='a' of b: must be a job that follows none"):
        make_plan([job("b", layout, leader="a")], 2)
    with pytest.raises(ValueError, match=r"b \(\) and a \(float\) can't share a bucket: must be of one dtype"):
        make_plan([job("a", layout, kind="float"), job("b", layout, leader="a")], 2)


def test_ranks_work_on_similar_matrices_at_the_same_time():
    """Large and small matrices alternate in the model, but each bucket has one size, so no rank waits."""
    layout = Layout.replicated((10, 10), 4)
    listed = [job(f"w{k:02}", layout, cost=(9.0, 1.0)[k % 2]) for k in range(16)]
    plan = make_plan(listed, 4, bucket_bytes=400)
    assert [{plan.jobs[j].cost for j in bucket} for bucket in plan.buckets] == [{9.0}, {9.0}, {1.0}, {1.0}]
    assert plan.lockstep() == max(plan.loads())
