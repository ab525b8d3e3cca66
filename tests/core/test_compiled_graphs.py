"""A compiled update is one graph per rule, compiled once, with the rule's results and precision."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError
from training_in_graphs import VARIANTS, Backend, Training

import steepest
from steepest.linalg.precision import fp32_matmul_precision

QUICK = ["soap", "dion"]
"""Whose graphs are made in seconds; all others' are made in the long tests."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_a_graph_steps_as_its_rule_does(name: str, backend: Backend) -> None:
    compiled, plain = Training(name, compile=True), Training(name)
    for number in range(30):
        compiled.eventful(number)
        plain.eventful(number)
    assert backend.graphs >= 3, "a graph for each stack"
    for x, y in zip(compiled.seen(), plain.seen(), strict=True):
        if x.is_floating_point() and x.dtype != torch.bfloat16:
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


@pytest.mark.parametrize(
    "name",
    ["soap", "inverse_root", "dion2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("soap kl", "adamuon"))],
)
def test_a_rule_is_one_graph_and_made_once(name: str, backend: Backend) -> None:
    training = Training(name, compile=True)
    for _ in range(9):
        training.step()
    assert backend.graphs == 2, "two shapes"
    runs = backend.runs
    training.step(missing=0)  # of one stack, some: operation by operation
    assert (backend.graphs, backend.runs - runs) == (2, 0 if name.startswith("soap") or name == "inverse_root" else 1)
    Training(name, compile=True).step()
    assert backend.graphs == 2, "an equal rule has the same"
    group = training.optimizer.param_groups[0]
    group["momentum" if "momentum" in group else "ef_decay" if "ef_decay" in group else "shampoo_beta"] = 0.5
    for _ in range(3):
        training.step()
    assert backend.graphs == 4, "another rule"


@pytest.mark.parametrize("name", ["soap kl", "muon", pytest.param("soap", marks=pytest.mark.slow)])
def test_a_graph_runs_at_its_rule_s_precision(name: str, backend: Backend) -> None:
    training = Training(name, compile=True)
    for around in ("highest", "medium", "highest"):
        with fp32_matmul_precision(around):
            for _ in range(3):
                training.step()
        assert torch.get_float32_matmul_precision() == "highest"
    assert backend.precisions == {"high" if name == "soap kl" else "highest"}


def test_any_number_of_shapes_is_compiled(backend: Backend) -> None:
    """torch gives up on a function after eight graphs."""
    params = [nn.Parameter(torch.ones(3, 2 + k)) for k in range(10)]
    optimizer = steepest.Dion2(params, lr=0.1, compile=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert backend.graphs == 10


def test_lists_and_functions_among_the_options_compile_once(backend: Backend) -> None:
    schedule = steepest.LinearSchedule(start=2, end=4, transition_steps=10)
    training = Training("soap", compile=True, betas=[0.9, 0.95], precondition_frequency=schedule)
    for _ in range(12):
        training.step()
    assert backend.graphs == 2


def expect_agreement(name: str) -> None:
    torch._dynamo.reset()
    compiled, plain = Training(name, compile=True), Training(name)
    for _ in range(5):
        compiled.step()
        plain.step()
    for p, q in zip(compiled.params, plain.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


some_graphs_fail = pytest.mark.filterwarnings(
    "ignore:compile=True.*KeyError" if torch.__version__ < (2, 13) else "error::UserWarning"
)
"""Older Inductors fail on the graphs of SOAP's family on a CPU."""


@some_graphs_fail
def test_inductor_agrees() -> None:
    expect_agreement("soap")


@some_graphs_fail
@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_inductor_agrees_on_every_rule(name: str) -> None:
    expect_agreement(name)


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_a_graph_that_inductor_fails_on_runs_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise InductorError(KeyError("buf9"), inspect.currentframe())

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    with pytest.warns(UserWarning, match=r"compile=True: an update can't be compiled.*KeyError: 'buf9'$"):
        expect_agreement(name)
