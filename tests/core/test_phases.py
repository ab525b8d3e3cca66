"""Phases of a step: a listener gets their times, nothing else changes, and compiled graphs contain no marks."""

from __future__ import annotations

import pytest
import torch

import steepest
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


@pytest.mark.filterwarnings("ignore")  # where the graph breaks, torch says so
def test_a_compiled_step_is_the_same_and_traced_once():
    def trained(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(6, 4))]
        optimizer = steepest.SOAP(params, lr=0.1, precondition_frequency=2)
        step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
        for _ in range(8):
            params[0].grad = torch.randn(6, 4)
            step()
            counts.append(len(graphs) if compiled else 0)
        return params

    graphs: list[object] = []
    counts: list[int] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.testing.assert_close(trained(True), trained(False))  # scalars are rounded elsewhere in a graph
    assert counts[4:8] == [counts[4]] * 4, "traced anew, after two refreshes"
