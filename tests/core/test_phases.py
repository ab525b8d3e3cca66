"""Phases of a step: a listener gets their times, nothing else changes, and compiled graphs contain no marks."""

from __future__ import annotations

import pytest
import torch

from steepest.engine.phases import REST, Timeline, listening, phase


def clock():
    ticks = iter(range(1000))
    return lambda: next(ticks)


def spent(timeline: Timeline) -> dict[str, float]:
    return timeline.spent(lambda start, end: end - start)


@phase("apply")
def inner(x):
    return x + 1


@phase("project")
def outer(x):
    return inner(x) * inner(x)


def test_inner_time_does_not_count_outside():
    timeline = Timeline(clock())
    with listening(timeline):
        outer(1)
    assert [name for name, _ in timeline.marks] == [REST, "project", "apply", "project", "apply", "project", REST, REST]
    assert spent(timeline) == {REST: 2, "project": 3, "apply": 2}
    assert sum(spent(timeline).values()) == timeline.marks[-1][1] - timeline.marks[0][1]


def test_an_exception_closes_its_phases():
    @phase("factors")
    def fails():
        raise KeyError

    timeline = Timeline(clock())
    with listening(timeline):
        with pytest.raises(KeyError):
            fails()
        inner(1)
    assert [name for name, _ in timeline.marks][-4:] == [REST, "apply", REST, REST]


def test_nobody_hears_afterwards_and_one_at_a_time():
    timeline = Timeline(clock())
    with pytest.raises(KeyError), listening(timeline):
        raise KeyError
    inner(1)
    assert len(timeline.marks) == 2
    with listening(timeline), pytest.raises(RuntimeError, match="one listener"), listening(Timeline(clock())):
        pass
    with listening(timeline):
        pass


def test_a_marked_function_stays_itself():
    assert (outer.__name__, outer.__wrapped__(2)) == ("outer", 9)


def test_a_graph_holds_no_marks_and_is_made_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(outer, fullgraph=True, backend=backend)
    x = torch.arange(3.0)
    timeline = Timeline(clock())
    torch.testing.assert_close(compiled(x), outer(x), rtol=0, atol=0)
    with listening(timeline):
        torch.testing.assert_close(compiled(x), outer.__wrapped__(x), rtol=0, atol=0)
    compiled(x)
    assert len(graphs) == 1, "listening had the graph made anew"
