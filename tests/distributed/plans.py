"""Jobs and plans for the tests of plans: made by hand, or drawn by hypothesis."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.plan import Job, Plan, make_plan

MANY = [64, 100, 1024, 4096]


def job(name: str, layout: Layout, window: Rectangle | None = None, cost: float = 1.0, **others) -> Job:
    return Job(name, layout, window or layout.whole, cost, **{"memory": 1, "itemsizes": (2, 4)} | others)


def with_costs(values, world: int, **others) -> list[Job]:
    layout = Layout.replicated((2, 2), world)
    return [job(f"w{k:03}", layout, cost=cost, **others) for k, cost in enumerate(values)]


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
