"""Chapter 18: optimizers that require a closure, and evaluate it as often as they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from steepest.testing.evidence import Broken, NotApplicable, expect, expect_same, one_line
from steepest.testing.gradients import lasting
from steepest.testing.run import Run
from steepest.testing.saving import by_file
from steepest.testing.subject import Subject, clause

MOST = 200
"""The largest number of evaluations in a step that is taken for bounded."""


class Failure(Exception):
    """The error that a closure raises."""


@clause(18, "a step without a closure raises TypeError in words, and changes nothing", closure=True)
def closure_required(subject: Subject) -> None:
    """An optimizer that can't do without a closure says so, also for the ``closure=None`` that hosts pass on."""
    run = subject.start()
    run.step(0)
    run.set_gradients(1)
    before, step = run.everything(), run.optimizer.step
    for call, arguments in (("step()", {}), ("step(closure=None)", {"closure": None})):
        try:
            step(**arguments)
        except Exception as error:
            named = isinstance(error, TypeError) and "closure" in str(error)
            expect(named, f"a TypeError that speaks of the closure from {call}", one_line(error))
        else:
            raise Broken(f"expected a TypeError from {call}; saw a step")
        expect_same(run.everything(), before, f"no change by {call}")


@clause(18, "an error in a closure reaches the caller, and nothing has changed")
def closure_error(subject: Subject) -> None:
    """A step that can't be completed is not taken: weights and state are as before it, and training goes on.

    Where all parameters have one state, it may keep what it learned before the error.
    """
    run = subject.start()
    run.steps(range(2))
    for at in (1, 2, 3) if subject.by_closure else (1,):
        run.set_gradients(2)
        before, calls = lasting(subject, run), 0

        def fail(at: int = at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Failure(f"in evaluation {at}")
            return run.closure() if run.closure else None

        try:
            run.act(fail)
        except Failure:
            expect_same(lasting(subject, run), before, f"no change by a step whose evaluation {at} raised an error")
        else:
            expect(calls < at, f"the error of evaluation {at} to reach the caller", "a step")
    run.expect_training(range(3, 5), "training after closures that raised errors")


@clause(18, "a loss that is not finite moves nothing", closure=True)
def closure_nonfinite(subject: Subject) -> None:
    """A step whose loss is NaN or infinite, at its start or from its second evaluation on, leaves all weights."""
    for value in (math.nan, math.inf):
        for first in (1, 2):
            run = subject.start()
            run.steps(range(2))
            before = run.weights()
            _act_spoiled(run, 2, value, first)
            where = f"a step whose evaluations are {value} from the {'first' if first == 1 else 'second'} on"
            expect_same(run.weights(), before, f"no weight to move in {where}")
            run.expect_training(range(3, 5), f"training after {where}")


@clause(18, "the loss of a convex problem falls", closure=True)
def closure_descends(subject: Subject) -> None:
    """With the closure of a strictly convex loss no step raises it, and a few steps halve it."""
    run = subject.start()
    run.set_gradients(0)
    losses = [run.loss()]
    for _ in range(8):
        run.step(0)
        losses.append(run.loss())
    rises = [k for k in range(8) if not losses[k + 1] <= losses[k] * (1 + 1e-3) + 1e-6]
    seen = ", ".join(f"{x:.4g}" for x in losses)
    expect(not rises, "a loss that falls in every step", seen)
    expect(losses[-1] < losses[0] / 2, "half the loss after 8 steps", seen)


@clause(18, "a closure is evaluated a bounded number of times", closure=True)
def closure_evaluations(subject: Subject) -> None:
    """A step ends, whatever the loss does, and keeps to ``max_eval`` where there is such an option."""
    for first in (10**9, 2, 1):
        run = subject.start()
        run.steps(range(2))
        calls = _act_spoiled(run, 2, math.nan, first)
        expect(0 < calls <= MOST, f"between 1 and {MOST} evaluations in a step", calls)
    if "max_eval" in subject.defaults:
        run = subject.start(max_eval=3)
        calls = _act_spoiled(run, 0, math.nan, 10**9)
        expect(calls <= 3, "no more than 3 evaluations with max_eval=3", calls)


@clause(18, "training resumes from a file after a step that failed", closure=True)
def closure_resumes(subject: Subject) -> None:
    """What a failed step left in the state, a larger damping for example, is saved: training goes on bit for bit."""
    straight, first = subject.start(), subject.start()
    for run in (straight, first):
        run.steps(range(3))
        _act_spoiled(run, 3, math.nan, 2)
    second = by_file(subject, first)
    for run in (straight, second):
        run.steps(range(4, 7))
    expect_same(second.everything(), straight.everything(), "the same training as without the break, bit for bit")


@clause(18, "parameters in several groups train as in one", closure=True, several=True)
def closure_groups(subject: Subject) -> None:
    """How parameters are grouped means nothing as long as options are the same; a group may be empty."""
    one = subject.start()
    two = subject.start(
        form=lambda params: [
            {"params": [params[subject.first]]},
            {"params": []},
            {"params": [params[name] for name in subject.others]},
        ]
    )
    for run in (one, two):
        run.steps(range(3))
    expect_same(two.everything(), one.everything(), "the same training in several groups as in one")


@clause(18, "groups with different options are refused", closure=True, several=True)
def closure_options(subject: Subject) -> None:
    """Where all parameters move as one vector, an option of one group alone raises ValueError at construction."""
    if not subject.joint:
        raise NotApplicable("has state and options for each parameter")
    numbers = [name for name, value in subject.defaults.items() if type(value) in (int, float) and value > 0]
    if not numbers:
        raise NotApplicable("has no option that is a number")
    option, value = numbers[0], subject.defaults[numbers[0]]
    other = value + 1 if isinstance(value, int) else value / 2

    def differ(params: dict[str, Tensor]) -> Any:
        rest = [params[name] for name in subject.others]
        return [{"params": [params[subject.first]], option: other}, {"params": rest}]

    try:
        subject.start(form=differ)
    except ValueError as error:
        named = option in str(error) or "group" in str(error)
        expect(named, f"an error that speaks of {option} or of groups", one_line(error))
    else:
        raise Broken(f"expected a ValueError for {option}={other} in one group and {value} in the other; saw none")


def _act_spoiled(run: Run, k: int, value: float, first: int) -> int:
    """Take step ``k`` with a loss times ``value`` from its evaluation ``first`` on, and count evaluations."""
    run.set_gradients(k)
    required: Callable[[], Any] | None = run.closure
    assert required is not None
    calls = 0

    def evaluate() -> Any:
        nonlocal calls
        calls += 1
        found = required()
        if calls < first:
            return found
        return (found[0], found[1] * value) if isinstance(found, tuple) else found * value

    run.act(evaluate)
    return calls
