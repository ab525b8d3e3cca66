"""Chapter 17: state and groups that others edit by hand, between two steps."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from steepest.testing.evidence import NotApplicable, difference, expect, expect_same, snapshot
from steepest.testing.run import Run
from steepest.testing.saving import Transfer, by_copy, by_file, carry, expect_alike
from steepest.testing.subject import Subject, clause


@clause(17, "state that is replaced by a copy changes nothing")
def copied_state(subject: Subject) -> None:
    """Scripts that load, average or move state bind other tensors in ``optimizer.state[p]``; training goes on."""
    straight, run = _pair(subject)
    for state, name, x in _tensors(run):
        state[name] = x.clone()
    for each in (straight, run):
        each.steps(range(3, 6))
    expect_same(run.everything(), straight.everything(), "the same training after state was replaced by a copy")


@clause(17, "state that is replaced counts, in steps and in checkpoints")
def replaced_state(subject: Subject) -> None:
    """A tensor that is bound in ``optimizer.state[p]`` is what steps use and checkpoints save, not the one before."""
    untouched, zeroed = _pair(subject)
    replaced = _run(subject)
    for _, _, x in _averages(zeroed):
        x.zero_()
    for state, name, x in _averages(replaced):
        state[name] = torch.zeros_like(x)
    resumed = by_file(subject, replaced)
    for run in (untouched, zeroed, replaced, resumed):
        run.steps(range(3, 6))
    expected, usual = zeroed.everything(), untouched.everything()
    if not any(difference(expected[path], x) for path, x in usual.items()):
        raise NotApplicable("uses nothing of its state in its first steps")
    expect_same(replaced.everything(), expected, "state that is replaced by zeros to count as zeroed state")
    expect_same(resumed.everything(), expected, "a checkpoint to hold the zeros that state was replaced by")


@clause(17, "a parameter whose state is cleared begins anew", several=True)
def cleared_state(subject: Subject) -> None:
    """Warm restarts, pruning and resets drop the state of some parameters, which then train as from the start."""
    one, everyone = [subject.first], list(subject.shapes)
    ways: dict[str, tuple[Callable[[Any, Tensor], object], list[str]]] = {
        "del optimizer.state[p]": (lambda optimizer, p: optimizer.state.pop(p), one),
        "optimizer.state[p] = {}": (lambda optimizer, p: optimizer.state.update({p: {}}), one),
        "optimizer.state[p].clear()": (lambda optimizer, p: optimizer.state[p].clear(), one),
        "optimizer.state.clear()": (lambda optimizer, p: optimizer.state.clear(), everyone),
        "optimizer.state = defaultdict(dict)": (
            lambda optimizer, p: setattr(optimizer, "state", defaultdict(dict)),
            everyone,
        ),
    }
    straight = _run(subject)
    if not any(_tensors(straight)):
        raise NotApplicable("keeps no tensors in its state")
    fresh = carry(straight.params, subject.start())
    for run in (straight, fresh):
        run.steps(range(3, 6))
    for way, (clear, names) in ways.items():
        if subject.coupled and names is one:
            continue
        run = _run(subject)
        clear(run.optimizer, run.params[subject.first])
        run.steps(range(3, 6))
        expect_same(run.everything(*names), fresh.everything(*names), f"a new beginning after {way}")
        others = set(everyone).difference(names)
        if others:
            expect_same(run.everything(*others), straight.everything(*others), f"no effect of {way} on the others")


@clause(17, "parameters may be reordered within their group", several=True)
def reordered_parameters(subject: Subject) -> None:
    """State belongs to its parameter, wherever that stands in its group; checkpoints have the group's new order."""
    straight, run = _pair(subject)
    if not subject.takes_forms:
        raise NotApplicable("takes a model, whose order is that of its layers")
    run.optimizer.param_groups[0]["params"].reverse()
    params = subject.params()
    reverse = subject.over(params, list(reversed(params.values())))
    resumed = carry(run.params, reverse, copy.deepcopy(run.optimizer.state_dict()))
    if not subject.joint:
        expect_same(resumed.everything(), straight.everything(), "a checkpoint in the parameters' new order")
    start = straight.weights()
    for each in (straight, run, resumed):
        each.steps(range(3, 6))
    expect_alike(subject, run, straight, start, "the same training after parameters were reordered")
    expect_alike(subject, resumed, straight, start, "the same training from a checkpoint in the new order")


@clause(17, "a parameter may move to another group", several=True)
def moved_parameter(subject: Subject) -> None:
    """Schedules that unfreeze or decay layers move parameters between groups; state goes with its parameter."""
    *some, last = [subject.first, *subject.others]
    straight, run = (
        subject.start(form=lambda params: [{"params": [params[name] for name in names]} for names in (some, [last])])
        for _ in range(2)
    )
    for each in (straight, run):
        each.steps(range(3))
    source, target = (group["params"] for group in run.optimizer.param_groups)
    target.append(source.pop(0))
    start = straight.weights()
    for each in (straight, run):
        each.steps(range(3, 6))
    expect_alike(subject, run, straight, start, "the same training after a parameter moved to another group")


@clause(17, "entries that others add to the state are kept, and not used")
def foreign_entries(subject: Subject) -> None:
    """Wrappers keep slow weights and counters in an optimizer's state, under names of their own, or beside it."""
    straight, run = _pair(subject)
    notes = {"note": "text", "slow": torch.full((3,), 2.0, dtype=subject.dtype, device=subject.device), "count": 3}
    for p in run.params.values():
        run.optimizer.state[p].update(copy.deepcopy(notes))
    everything: Any = run.optimizer.state
    everything["global"] = 3
    transfers: dict[str, Transfer] = {
        "where they were": lambda subject, run: run,
        "in a copy": functools.partial(by_copy, duplicate=copy.deepcopy),
        "in a pickle": functools.partial(by_copy, duplicate=lambda optimizer: pickle.loads(pickle.dumps(optimizer))),
        "in a file": by_file,
    }
    for each in (straight, run):
        each.steps(range(3, 6))
    for where, transfer in transfers.items():
        if transfer is by_file:
            del notes["note"]  # torch.optim saves strings, but doesn't load them
        other = transfer(subject, run)
        seen: Any = other.optimizer.state
        for p in other.params.values():
            expect_same(snapshot({name: seen[p].get(name) for name in notes}), snapshot(notes), f"entries {where}")
        expect(seen.get("global") == 3, f"an entry of all parameters {where}, 3", seen.get("global"))
    for each in (straight, other):
        each.steps(range(6, 8))
    expect_same(other.weights(), straight.weights(), "the same training beside entries that others added")


def _run(subject: Subject) -> Run:
    """Return a run after three steps."""
    run = subject.start()
    run.steps(range(3))
    return run


def _pair(subject: Subject) -> tuple[Run, Run]:
    """Return two equal runs after three steps."""
    return _run(subject), _run(subject)


def _tensors(run: Run) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Return every tensor in a run's state, with the dict that holds it and its name there."""
    for state in list(run.optimizer.state.values()):
        for name, x in list(state.items()):
            if isinstance(x, Tensor):
                yield state, name, x


def _averages(run: Run) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return the tensors of several floating-point numbers in a run's state."""
    found = [(state, name, x) for state, name, x in _tensors(run) if x.is_floating_point() and x.numel() > 1]
    if not found:
        raise NotApplicable("keeps no tensors in its state")
    return found
