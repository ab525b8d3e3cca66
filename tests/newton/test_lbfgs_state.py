"""The options and the state of L-BFGS: saved, resumed, reordered and refused."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from functions import F64, same
from torch import Tensor, nn

import steepest


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be a number >= 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": torch.tensor(-1.0)}, "lr=tensor"),
        ({"max_iter": 0}, "max_iter=0: must be an integer >= 1"),
        ({"max_iter": 2.5}, "max_iter=2.5"),
        ({"max_eval": 0}, "max_eval=0"),
        ({"history_size": 0}, "history_size=0"),
        ({"history_size": True}, "history_size=True"),
        ({"tolerance_grad": -1.0}, "tolerance_grad=-1.0"),
        ({"tolerance_change": math.inf}, "tolerance_change=inf"),
        ({"line_search": "armijo"}, "line_search='armijo': must be 'strong_wolfe' or None"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        steepest.LBFGS([nn.Parameter(torch.ones(2))], **options)
    optimizer = steepest.LBFGS([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=complaint):
        optimizer.step(lambda: torch.tensor(1.0))


def test_groups_share_their_options() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1.0, 0.5)]
    with pytest.raises(ValueError, match=r"lr=0.5 in group 1, 1.0 in group 0"):
        steepest.LBFGS(groups)


class Run:
    """Two parameters of a coupled quartic loss, and their optimizer."""

    def __init__(self, named: bool = True, backwards: bool = False, dtype: torch.dtype = F64, **options: Any) -> None:
        g = torch.Generator().manual_seed(3)
        self.params = {
            name: nn.Parameter(torch.randn(shape, generator=g, dtype=F64).to(dtype))
            for name, shape in (("W", (3, 2)), ("b", (4,)))
        }
        order = dict(reversed(self.params.items())) if backwards else self.params
        self.optimizer = steepest.LBFGS(
            list(order.items()) if named else list(order.values()), **{"max_iter": 3, "history_size": 4} | options
        )

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        W, b = self.params["W"], self.params["b"]
        loss = (W.square().sum() - b.sum()) ** 2 + (b**4).sum() + (W.flatten()[:4] - b).square().sum()
        loss.backward()
        return loss

    def steps(self, n: int) -> Run:
        for _ in range(n):
            self.optimizer.step(self.closure)
        return self

    def carry(self, other: Run) -> Run:
        """Take weights over."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(other.params[name])
        return self

    def expect(self, other: Run) -> None:
        """Expect the same weights and state, bit for bit."""
        for name, p in self.params.items():
            assert torch.equal(p, other.params[name]), name
            same(self.optimizer.state[p], other.optimizer.state[other.params[name]])


def by_file(run: Run, **options: Any) -> Run:
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    new = Run(dtype=run.params["W"].dtype, **options).carry(run)
    new.optimizer.load_state_dict(torch.load(file, weights_only=True))
    return new


def by_copy(run: Run, duplicate: Callable[[Any], Any] = copy.deepcopy) -> Run:
    new = Run()
    new.optimizer, params = duplicate((run.optimizer, run.params))
    new.params = params
    return new


def by_distributed(run: Run, flat: bool) -> Run:
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    new = Run().carry(run)
    saved = dcp.get_optimizer_state_dict(nn.ParameterDict(run.params), run.optimizer, options=options)
    dcp.set_optimizer_state_dict(nn.ParameterDict(new.params), new.optimizer, copy.deepcopy(saved), options=options)
    return new


WAYS: dict[str, Callable[[Run], Run]] = {
    "file": by_file,
    "deepcopy": by_copy,
    "pickle": lambda run: by_copy(run, lambda x: pickle.loads(pickle.dumps(x))),
    "distributed": lambda run: by_distributed(run, flat=False),
    "flattened": lambda run: by_distributed(run, flat=True),
}


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_training_resumes_bit_for_bit(way: str, after: int) -> None:
    straight, first = Run().steps(after), Run().steps(after)
    second = WAYS[way](first)
    second.expect(straight)
    second.steps(2).expect(straight.steps(2))
    first.expect(Run().steps(after))


@pytest.mark.parametrize("options", [{"line_search": None, "lr": 1e-2}, {"dtype": torch.bfloat16}])
def test_others_resume_too(options: dict[str, Any]) -> None:
    straight, first = Run(**options).steps(2), Run(**options).steps(2)
    resumed = by_file(first, **{k: v for k, v in options.items() if k != "dtype"})
    resumed.steps(3).expect(straight.steps(3))
    assert resumed.optimizer.state[resumed.params["W"]]["steps"].dtype in (torch.float32, F64)


def test_a_used_optimizer_begins_anew_with_an_unused_state() -> None:
    saved = copy.deepcopy(Run().optimizer.state_dict())
    used = Run().steps(2)
    used.carry(Run()).optimizer.load_state_dict(saved)
    used.steps(2).expect(Run().steps(2))


def close(run: Run, expected: Run) -> None:
    for name, p in run.params.items():
        torch.testing.assert_close(p, expected.params[name], rtol=0, atol=1e-12)


def test_states_are_matched_by_name_and_follow_reordered_parameters() -> None:
    expected, first = Run().steps(4), Run().steps(2)
    backwards = by_file(first, backwards=True)
    close(backwards.steps(2), expected)

    reordered = Run().steps(2)
    reordered.optimizer.param_groups[0]["params"].reverse()
    reordered.optimizer.param_groups[0]["param_names"].reverse()
    close(by_file(reordered), first)
    close(by_file(reordered).steps(2), expected)
    close(by_copy(reordered).steps(2), expected)
    close(reordered.steps(2), expected)


@pytest.mark.parametrize("named", [True, False])
def test_what_does_not_fit_is_refused_and_nothing_has_changed(named: bool) -> None:
    run, expected = Run(named).steps(2), Run(named).steps(2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    other = steepest.LBFGS([nn.Parameter(torch.ones(3))]).state_dict()
    damages: list[tuple[Any, str]] = [
        ({"state": saved["state"]}, "no 'state' and 'param_groups'"),
        (other, r"groups have \[1\] parameters, the optimizer's groups have \[2\]"),
    ]
    for name, value in (("steps", None), ("pairs", "gone"), ("curvature", torch.zeros(3, 3, dtype=F64))):
        damaged = copy.deepcopy(saved)
        damaged["state"][0][name] = value
        damages.append((damaged, f"{name} of LBFGS's state is"))
    for option, value in (("lr", -1.0), ("history_size", 5)):
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0][option] = value
        damages.append((damaged, "lr=-1.0" if option == "lr" else "steps of LBFGS's state"))
    if named:
        damaged = copy.deepcopy(saved)
        damaged["param_groups"][0]["param_names"] = ["W", "c"]
        damages.append((damaged, "other parameters: b is in one only"))
    for damaged, complaint in damages:
        with pytest.raises(ValueError, match=complaint):
            run.optimizer.load_state_dict(damaged)
    run.steps(1).expect(expected.steps(1))


def test_parameters_that_thaw_or_are_added_begin_anew() -> None:
    a, b, c = (nn.Parameter(torch.full((2,), value, dtype=F64)) for value in (2.0, 3.0, 4.0))
    a.requires_grad_(False)
    optimizer = steepest.LBFGS([a, b])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in (a, b, c)) + (a * b * c).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[b]["steps"].shape == (100, 2)
    a.requires_grad_(True)
    optimizer.step(closure)
    assert optimizer.state[a]["steps"].shape == (100, 4)
    assert optimizer.state[b].keys() == {"step"}
    optimizer.add_param_group({"params": [c]})
    optimizer.param_groups[0]["history_size"] = optimizer.param_groups[1]["history_size"] = 7
    optimizer.step(closure)
    assert optimizer.state[a]["steps"].shape == (7, 6)
    assert optimizer.state_dict()["state"][2].keys() == {"step"}
    optimizer.state[a]["steps"] = torch.zeros(7, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"steps of LBFGS's state is \[7, 3\], must be a tensor of shape \[7, 6\]"):
        optimizer.step(closure)
