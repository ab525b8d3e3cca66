"""Jobs and plans for the tests of plans: made by hand, or drawn by hypothesis."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.plan import Job, Plan, make_plan

MANY = [64, 100, 1024, 4096]


def job(name: str, layout: Layout, rectangle: Rectangle | None = None, cost: float = 1.0, **others) -> Job:
    return Job(name, layout, rectangle or layout.whole, cost, **{"memory": 1, "itemsizes": (2, 4)} | others)


def with_costs(values, world: int, **others) -> list[Job]:
    layout = Layout.replicated((2, 2), world)
    return [job(f"w{k:03}", layout, cost=cost, **others) for k, cost in enumerate(values)]


# What hypothesis draws.


@st.composite
def meshes(draw, world: int) -> tuple[int, ...]:
    """Draw a mesh of so many ranks, of up to three dimensions."""
    mesh = []
    for _ in range(draw(st.integers(0, 2))):
        mesh.append(draw(st.sampled_from([d for d in range(1, min(world, 64) + 1) if world % d == 0])))
        world //= mesh[-1]
    return (*mesh, world)


@st.composite
def layouts(draw, world: int) -> Layout:
    """Draw a layout: whole, sharded, replicated in part, or sharded twice on one dimension; shards may be empty."""
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    mesh = draw(meshes(world))
    cut = st.sampled_from([None, *range(len(shape))])
    return Layout.sharded(shape, mesh, [draw(cut) for _ in mesh])


@st.composite
def jobs(draw, world: int, most: int = 6) -> list[Job]:
    """Draw jobs of whole parameters and of rectangles, in a few layouts."""
    shared = draw(st.lists(layouts(world), min_size=1, max_size=3))
    found = []
    for number in range(draw(st.integers(1, most))):
        layout = draw(st.sampled_from(shared))
        edges = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in layout.shape]
        rectangle = Rectangle(tuple(a for a, _ in edges), tuple(b - a for a, b in edges))
        leader = draw(st.sampled_from([None, *(j for j in found if not j.leader)]))
        found.append(
            job(
                f"w{number}",
                layout,
                draw(st.sampled_from([layout.whole, rectangle])),
                cost=draw(st.integers(0, 9)),
                memory=draw(st.integers(0, 9)),
                kind=leader.kind if leader else draw(st.sampled_from(["a", "b"])),
                factored=draw(st.sampled_from([0, 5, 50])),
                leader=leader.name if leader else "",
            )
        )
    return draw(st.permutations(found))  # a follower may come before its leader


@st.composite
def plans(draw, worlds=range(1, 14)) -> Plan:
    world = draw(st.sampled_from(worlds))
    return make_plan(draw(jobs(world)), world, bucket_bytes=draw(st.sampled_from([1, 500, 10**9])))


large = settings(max_examples=10)
"""For plans of many ranks."""
