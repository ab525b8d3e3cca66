"""The contract notices when one thing in our engine is wrong."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor

from steepest.engine.optimizer import Optimizer
from steepest.stack import stack as stacks
from steepest.testing import CLAUSES, Verdict, check_clause
from steepest.testing.subject import Subject


def broken(*clauses: str) -> set[str]:
    """Which of the clauses our SOAP breaks now."""
    subject = Subject(functools.partial(Optimizer, rule="soap", lr=1e-2, precondition_frequency=1))
    return {name for name in clauses if check_clause(CLAUSES[name], subject).verdict is Verdict.BROKEN}


def test_a_wrong_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    views = stacks.Stack.views

    def neighbours(self: stacks.Stack, segment: stacks.Segment) -> dict[str, Tensor]:
        return views(self, self.segments[self.segments.index(segment) - 1])

    monkeypatch.setattr(stacks.Stack, "views", neighbours)
    clauses = {"missing_leaves_state", "bad_gradient_waits"}
    assert broken(*clauses) == clauses


def test_a_dropped_cast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "state_dtype", lambda p: p.dtype)
    assert broken("float32_state")


def test_a_clock_that_is_not_restored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Optimizer._load

    def forgetful(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        clocks = [stack.clock.clone() for stack in optimizer._stacks]
        load(optimizer, state_dict)
        for stack, clock in zip(optimizer._stacks, clocks, strict=True):
            stack.clock.copy_(clock)

    monkeypatch.setattr(Optimizer, "_load", forgetful)
    clauses = {"resume_float32", "resume_bfloat16", "resume_flattened"}
    assert broken(*clauses) == clauses
