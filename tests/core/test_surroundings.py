"""Whatever its caller is in the middle of, an optimizer constructs, steps, saves and loads as it does by itself.

`steepest.testing` asks some of this of any optimizer. Here construction and first step are inside, too.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import fed
import pytest
import torch
from torch import Tensor, nn
from training_in_graphs import VARIANTS

import steepest
from steepest.linalg import attempts
from steepest.rules import RULES
from steepest.stack import storage
from steepest.testing.evidence import Snapshot, expect_same
from steepest.testing.saving import carry
from steepest.testing.subject import Subject

Surroundings = Callable[[], AbstractContextManager[Any]]
EVERYTHING = {name: (name, {}) for name in RULES} | VARIANTS | {"amsgrad": ("adamw", {"amsgrad": True})}


@contextmanager
def setting(write: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    write(value)
    try:
        yield
    finally:
        write(usual)


@contextmanager
def all_at_once() -> Iterator[None]:
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        setting(torch.set_default_dtype, torch.float64, torch.float32),
        setting(torch.use_deterministic_algorithms, True, False),
        torch.inference_mode(),
    ):
        yield


SURROUNDINGS: dict[str, Surroundings] = {
    "all at once": all_at_once,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


def trained(name: str, surroundings: Surroundings) -> Snapshot:
    """Return weights and state after construction, steps, and saving and loading inside, and two more steps outside."""
    rule, options = EVERYTHING[name]
    subject = Subject(functools.partial(fed.optimizer, rule=rule, **{"lr": 0.1} | options))
    params, others = subject.params(), subject.params()
    cold, poisoned = params["second.weight"], params["first.weight"]
    cold.requires_grad_(False)
    with surroundings():
        run = subject.over(params, list(params.values()))
    for k in range(5):
        cold.requires_grad_(k > 1)
        run.set_gradients(k, missing=["kernel"] if k == 2 else [])
        if k == 3:
            poisoned.grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        with surroundings():
            run.act()
    with surroundings():
        other = subject.over(others, list(others.values()))
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    carry(run.params, other)
    replaced = {name: nn.Parameter(p.detach().clone()) for name, p in others.items()}
    other.params, other.optimizer.param_groups[0]["params"] = replaced, list(replaced.values())
    other.set_gradients(5)
    with surroundings():
        other.act()
    other.steps([6, 7])
    return other.everything()


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_rule_is_undisturbed(name: str) -> None:
    storage._levels.cache_clear()  # a table that is made once
    expect_same(trained(name, all_at_once), trained(name, nullcontext), "the same training")


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_anything_around_a_step_leaves_it_alone(surroundings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        seen, expected = trained("soap async", SURROUNDINGS[surroundings]), trained("soap async", nullcontext)
        expect_same(seen, expected, "the same training")
        monkeypatch.setattr(attempts, "at_hand", lambda x: False)  # as on a GPU


def test_a_closure_runs_in_its_caller_s_surroundings() -> None:
    W = nn.Parameter(torch.eye(3))
    optimizer = steepest.SOAP([W], lr=0.1)
    dtypes = []

    def closure() -> float:
        optimizer.zero_grad()
        product = W @ W
        dtypes.append(product.dtype)
        product.sum().backward()
        return 1.0

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert optimizer.step(closure) == 1.0
    assert dtypes == [torch.bfloat16]


def test_a_model_is_routed_in_any_surroundings() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    other = copy.deepcopy(model)
    with all_at_once():
        inside = steepest.for_model(model, "soap", lr=0.1)
    outside = steepest.for_model(other, "soap", lr=0.1)
    assert repr(inside) == repr(outside)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with all_at_once():
        inside.step()
    outside.step()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)


def test_parameters_of_inference_mode_are_refused() -> None:
    """They could be changed inside only, and a step is never inside."""
    fine = nn.Parameter(torch.eye(2))
    with torch.inference_mode():
        W = nn.Parameter(torch.eye(2))
    optimizer = steepest.SOAP([("fine", fine), ("W", W)], lr=0.1)
    W.grad, fine.grad = torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"W \(shape \[2, 2\]\) was made under torch.inference_mode\(\).*clone it"):
        optimizer.step()
    assert torch.equal(fine, torch.eye(2))
    assert optimizer.state[fine]["step"] == 0


# Compilers: Inductor takes seconds for what surrounds a step.

COMPILED = [*((name, "step") for name in EVERYTHING), *((name, how) for name in RULES for how in ("train", "closure"))]


def weights_after_twelve_steps(name: str, compiled: bool, how: str) -> list[Tensor]:
    rule, options = EVERYTHING[name]
    subject = Subject(functools.partial(fed.optimizer, rule=rule, **{"lr": 0.1} | options))
    run = subject.start()
    slopes = subject.params()

    def loss() -> Tensor:
        run.optimizer.zero_grad()
        total = torch.stack([(p * slope).sum() for p, slope in zip(run.params.values(), slopes.values(), strict=True)])
        total.sum().backward()
        return total

    def train() -> None:
        loss()
        run.optimizer.step()

    step = torch.compile(run.optimizer.step) if compiled else run.optimizer.step
    whole = torch.compile(train) if compiled else train
    for k in range(12):
        with torch.no_grad():
            for name, p in slopes.items():
                p.copy_(subject.params()[name] * (k + 1) + k)
        if how == "train":
            whole()
        elif how == "closure":
            step(loss)  # type: ignore[call-overload]
        else:
            loss()
            step()
    return [p.detach() for p in run.params.values()]


@pytest.mark.filterwarnings("ignore")  # where a graph breaks, torch says so
@pytest.mark.parametrize(
    ("name", "how"),
    [("soap", "step"), *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED if case != ("soap", "step"))],
)
def test_compilers_leave_a_step_alone(name: str, how: str) -> None:
    torch.compiler.reset()
    compiled = weights_after_twelve_steps(name, compiled=True, how=how)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, weights_after_twelve_steps(name, compiled=False, how=how), rtol=0, atol=0)
