"""Refreshes come when the frequency says so, also where that is a function of the clock."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import fed
import numpy as np
import pytest
import torch

import steepest
from steepest.engine.optimizer import Optimizer
from steepest.rule import Refreshing
from steepest.rules import RULES
from steepest.rules.soap import Soap
from steepest.stack.stagger import spread_offsets, stagger_offsets

REFRESHING = [name for name, rule in RULES.items() if issubclass(rule, Refreshing)]
SCHEDULES: dict[str, Callable[[int], int]] = {
    "linear": steepest.LinearSchedule(1, 100, 1000),
    "cosine": steepest.CosineSchedule(2, 60, 500),
    "steps": steepest.StepSchedule({0: 1, 100: 5, 300: 50}),
    "falling": steepest.LinearSchedule(50, 3, 400),
    "a tenth": lambda clock: 1 + clock // 10,
    "a third": lambda clock: 1 + clock // 3,
    "up and down": lambda clock: 3 if clock // 70 % 2 else 40,
    "no more": lambda clock: 4 if clock < 200 else 10**15,
    "numpy": lambda clock: np.int64(1 + clock // 50),
    "floats": lambda clock: 5.0,  # type: ignore[dict-item, return-value]
}
END = 1500


def due(rule: Refreshing[Any], offset: float = 0.0, end: int = END) -> list[int]:
    """The clocks at which a matrix refreshes."""
    return [clock for clock in range(end) if rule.due(clock, offset)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"adam_warmup_steps": 7}, {"adam_warmup_steps": 7, "basis_timing": "after"}])
def test_a_refresh_is_due_when_its_period_has_passed_since_the_last_one(name: str, options: dict[str, Any]) -> None:
    schedule = SCHEDULES[name]
    rule = Soap(precondition_frequency=schedule, **options)
    expected = [rule.first_refresh]
    for clock in range(rule.first_refresh + 1, END):
        if clock - expected[-1] >= schedule(clock):
            expected.append(clock)
    assert due(rule) == expected


@pytest.mark.parametrize("rule", REFRESHING)
def test_it_is_so_for_every_rule_that_refreshes(rule: str) -> None:
    built = RULES[rule](precondition_frequency=lambda clock: 1 + clock // 10)
    assert isinstance(built, Refreshing)
    gaps = [b - a for a, b in pairwise(due(built))]
    assert max(gaps) <= 1.2 * END / 10
    assert len(gaps) > 40


@pytest.mark.parametrize("period", [1, 2, 3, 7, 10, 1000])
def test_constant_periods_are_counted_by_their_multiples(period: int) -> None:
    for offset in {0, 1 % period, period // 2, period - 1}:
        clocks = due(Soap(precondition_frequency=period, adam_warmup_steps=5), offset / period)
        assert clocks == [5, *(clock for clock in range(6, END) if clock % period == offset)]


@pytest.mark.parametrize("jobs", [1, 2, 8, 13, 50])
@pytest.mark.parametrize("name", ["linear", "cosine", "steps", "falling", "a tenth"])
def test_staggered_refreshes_stay_spread(name: str, jobs: int) -> None:
    """No step refreshes more than twice what an even spread over the shortest period around it would."""
    schedule = SCHEDULES[name]
    rule = Soap(precondition_frequency=schedule)
    all_due = [due(rule, offset) for offset in spread_offsets([1.0] * jobs)]
    for clocks in all_due:
        for a, b in pairwise(clocks[1:]):
            assert min(map(schedule, (a, b))) - 1 <= 1.25 * (b - a) + 1
            assert b - a <= 1.25 * max(map(schedule, (a, b))) + 1
    for step in range(1, END):
        count = sum(step in clocks for clocks in map(set, all_due))
        assert count <= math.ceil(2 * jobs / schedule(max(step - 50, 0) if name != "falling" else step)), step


def test_a_large_last_period_costs_nothing() -> None:
    """At the end of time the period of 1 + clock // 10 is 10⁸, and a list of that length would be too long."""
    assert stagger_offsets([3.0, 2.0, 1.0], 10**12) == [0, 1, 2]
    params = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(4)]
    for every in (10**12, lambda clock: 1 + clock // 10):
        opt = steepest.SOAP(params, lr=0.1, stagger=True, precondition_frequency=every)
        assert len(refreshed(opt, params, range(3))) == 3


@pytest.mark.parametrize("costs", [[1.0] * 40, [8.0] * 8 + [1.0] * 42, [float(k**3) for k in range(1, 13)]])
@pytest.mark.parametrize("period", [1, 4, 10, 33])
def test_the_expensive_ones_are_far_apart_at_any_period(costs: list[float], period: int) -> None:
    loads = [0.0] * period
    for cost, offset in zip(costs, spread_offsets(costs), strict=True):
        loads[round(offset * period) % period] += cost
    assert max(loads) <= 2 * max(sum(costs) / period, max(costs))


# In an optimizer.


def gradient(shape: Iterable[int], seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refreshed(opt: Optimizer, params: list[torch.nn.Parameter], steps: Iterable[int]) -> list[list[bool]]:
    """Whether each parameter's bases or roots have changed in each step."""
    changed = []
    for step in steps:
        before = [slow(opt, p) for p in params]
        for k, p in enumerate(params):
            p.grad = gradient(p.shape, 100 * step + k)
        opt.step()
        changed.append([not torch.equal(old, slow(opt, p)) for old, p in zip(before, params, strict=True)])
    return changed


def slow(opt: Optimizer, p: torch.nn.Parameter) -> torch.Tensor:
    """A basis or an inverse root."""
    return next(x for name, x in opt.state[p].items() if name.startswith(("Q_", "P_"))).clone()


def steps_of(changed: list[list[bool]], which: int = 0) -> list[int]:
    return [step for step, now in enumerate(changed) if now[which]]


GROWING = [0, 1, 2, 3, 4, 5, 7, 9, 11, 14, 17]  # 1 + clock // 6 steps apart


@pytest.mark.parametrize(
    ("rule", "options"),
    [(rule, {"settle": 0, "statistics_frequency": 1} if rule in fed.CAPTURING else {}) for rule in REFRESHING]
    + [
        ("soap", {"basis_timing": "after"}),
        ("kl_soap", {"basis_timing": "after"}),
        ("soap", {"refresh_async": True}),
        ("kl_soap", {"refresh_async": True}),
        ("soap", {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.0}),
        ("soap", {"stagger": True}),
    ],
)
def test_bases_are_refreshed_then(rule: str, options: dict[str, Any]) -> None:
    W = torch.nn.Parameter(torch.zeros(4, 3))
    opt = fed.optimizer([W], rule, lr=0.1, precondition_frequency=lambda clock: 1 + clock // 6, **options)
    assert steps_of(refreshed(opt, [W], range(18))) == GROWING


def test_a_matrix_goes_by_its_own_clock() -> None:
    """A matrix that starts five steps late, and one whose third gradient is NaN, in a stack with an ordinary one."""
    _, W, late = params = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
    opt = steepest.SOAP(params, lr=0.1, precondition_frequency=lambda clock: 1 + clock // 6)
    changed = []
    for step in range(23):
        before = [slow(opt, p) for p in params]
        for k, p in enumerate(params):
            p.grad = gradient(p.shape, 100 * step + k)
        late.grad = late.grad if step >= 5 else None
        if step == 2:
            W.grad = torch.full_like(W, torch.nan)
        opt.step()
        changed.append([not torch.equal(old, slow(opt, p)) for old, p in zip(before, params, strict=True)])
    assert steps_of(changed, 0)[: len(GROWING)] == GROWING
    assert steps_of(changed, 1)[: len(GROWING)] == [step + (step >= 2) for step in GROWING]
    assert steps_of(changed, 2)[: len(GROWING)] == [step + 5 for step in GROWING]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [(5, 10), (10, 5), (4, lambda clock: 3 + clock // 10), (lambda clock: 3 + clock // 10, 4)],
    ids=["5 to 10", "10 to 5", "constant to schedule", "schedule to constant"],
)
def test_a_changed_frequency_counts_from_the_next_step_on(first: Any, second: Any, stagger: bool) -> None:
    params = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
    opt = steepest.SOAP(params, lr=0.1, precondition_frequency=first, stagger=stagger)
    changed = refreshed(opt, params, range(20))
    opt.param_groups[0]["precondition_frequency"] = second
    changed += refreshed(opt, params, range(20, 60))
    offsets = [0.0] * 3
    for start, stop, every in ((0, 20, first), (20, 60, second)):
        if stagger:
            costs = [1.0] * 3
            offsets = spread_offsets(costs) if callable(every) else [k / every for k in stagger_offsets(costs, every)]
        for k, offset in enumerate(offsets):
            clocks = due(Soap(precondition_frequency=every), offset, 60)
            assert [s for s in steps_of(changed, k) if start <= s < stop] == [c for c in clocks if start <= c < stop]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "five", 2.5, None, True])
def test_nonsense_is_named_before_anything_has_moved(value: Any) -> None:
    good, bad = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    schedule = lambda clock: 2 if clock < 3 else value  # noqa: E731
    groups = [{"params": [good]}, {"params": [bad], "precondition_frequency": schedule}]
    opt = steepest.SOAP(groups, lr=0.1)
    refreshed(opt, [good, bad], range(3))
    before = copy.deepcopy((good, bad, opt.state_dict()["state"]))
    with pytest.raises(ValueError, match=rf"precondition_frequency=.* gives {value!r} at clock 3: must give an int"):
        refreshed(opt, [good, bad], range(3, 4))
    assert torch.equal(good, before[0])
    assert torch.equal(bad, before[1])
    for i, state in opt.state_dict()["state"].items():
        assert all(torch.equal(x, before[2][i][name]) for name, x in state.items())
    opt.param_groups[1]["precondition_frequency"] = 3
    assert refreshed(opt, [good, bad], range(3, 4)) == [[False, True]]


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("name", ["linear", "a third"])
def test_a_resumed_run_refreshes_in_the_same_steps(name: str, stagger: bool) -> None:
    def built() -> tuple[list[torch.nn.Parameter], Optimizer]:
        params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 3), (6, 2), (4, 3), (3, 5))]
        return params, steepest.SOAP(params, lr=0.1, precondition_frequency=SCHEDULES[name], stagger=stagger)

    params, opt = built()
    refreshed(opt, params, range(25))
    again, resumed = built()
    resumed.load_state_dict(opt.state_dict())
    assert refreshed(resumed, again, range(25, 60)) == refreshed(opt, params, range(25, 60))


def test_a_schedule_needs_no_hash_and_is_called_once_for_each_clock() -> None:
    @dataclass
    class Counting:
        calls: int = 0

        def __call__(self, clock: int) -> int:
            self.calls += 1
            return 1 + clock // 6

    schedule = Counting()
    with pytest.raises(TypeError):
        hash(schedule)
    params = [torch.nn.Parameter(torch.zeros(4, 3 + k)) for k in range(3)]
    opt = steepest.SOAP(params, lr=0.1, precondition_frequency=schedule, stagger=True)
    for step in range(18):
        opt.param_groups[0]["lr"] = 0.1 / (1 + step)
        opt.param_groups[0]["betas"] = (0.9, 0.9 + step / 1000)
        refreshed(opt, params, [step])
    assert schedule.calls == 18


def test_steps_can_be_hashed_and_must_be_integers() -> None:
    assert hash(steepest.StepSchedule({0: 1, 5: 2})) == hash(steepest.StepSchedule({5: 2, 0: 1}))
    for bad in (0, "often", math.nan, True):
        with pytest.raises(ValueError, match=r"frequencies\[0\]=.*: must be an integer >= 1"):
            steepest.StepSchedule({0: bad})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=r"end=.*: must be a finite number >= 1"):
            steepest.LinearSchedule(1, bad, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"frequencies\[0\]=2.5: must be an integer >= 1"):
        steepest.StepSchedule({0: 2.5})  # type: ignore[dict-item]
