"""Updates as graphs: compiled or recorded, they are what they are operation by operation. Who is recorded, and when."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest import graphs
from steepest.linalg import attempts
from steepest.linalg.precision import fp32_matmul_precision
from steepest.rule import Refreshing, Rule
from steepest.rules import RULES

STACKED = [name for name, rule in RULES.items() if issubclass(rule, Rule)]
DECOMPOSING = ["dion", "moso"]
"""Those that do it in each step."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"precondition_frequency": 3} if issubclass(RULES[name], Refreshing) else {}) for name in STACKED},
    "soap kl": ("soap", {"precondition_frequency": 3, "use_kl_shampoo": True, "fp32_matmul_prec": "high"}),
    "soap after": ("soap", {"precondition_frequency": 4, "basis_timing": "after", "adam_warmup_steps": 3}),
    "soap async": ("soap", {"precondition_frequency": 3, "refresh_async": True, "stagger": True}),
    "soap short": ("soap", {"precondition_frequency": 3, "basis_dtype": "bfloat16", "moment_dtype": "int8"}),
    "soap l2": ("soap", {"precondition_frequency": 3, "weight_decay_method": "l2"}),
    "shampoo kl": ("shampoo", {"precondition_frequency": 3, "use_kl_shampoo": True}),
    "normuon l2": ("normuon", {"weight_decay_method": "l2"}),
}
QUICK = ["soap", "normuon", "dion", "inverse_root"]
"""Whose graphs are made in seconds; all others' are made in the long tests."""
RECORDED = [name for name, (rule, _) in VARIANTS.items() if rule not in DECOMPOSING]


class Tape:
    """Stands in for a CUDA graph: a replay does the recorded work once more, on the same memory."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    tape = Tape()
    monkeypatch.setitem(graphs.CAPTURES, "cpu", tape.capture)
    return tape


@pytest.fixture(params=["asks", "masks"])
def finding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How gradients that are not finite are found: as on a CPU, or as on accelerators."""
    if request.param == "masks":
        monkeypatch.setattr(attempts, "at_hand", lambda x: False)


class Training:
    """Two stacks, and a third of a matrix that thaws; gradients are the same for all trainings."""

    def __init__(self, name: str, device: str = "cpu", **options: Any) -> None:
        rule, own = VARIANTS[name]
        generator = torch.Generator().manual_seed(0)
        shapes = [(6, 4), (6, 4), (6, 4), (3, 5), (2, 7)]
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
        self.params[-1].requires_grad_(False)
        self.optimizer = steepest.Optimizer(self.params, rule, **{"lr": 0.1} | own | options)
        self.number = 0

    def step(self, bad: int | None = None, missing: int | None = None) -> None:
        generator = torch.Generator().manual_seed(self.number)
        for i, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=generator).to(p.device)
            p.grad = None if i == missing or not p.requires_grad else grad
        if bad is not None:
            self.params[bad].grad[0, 0] = math.nan
        self.optimizer.step()
        self.number += 1

    def eventful(self, number: int) -> None:
        """One of 30 steps in which all sorts of things happen."""
        group = self.optimizer.param_groups[0]
        momentum = "momentum" if "momentum" in group else "shampoo_beta"
        if number == 9:
            self.params[-1].requires_grad_(True)
        if number == 14:
            group[momentum] = 0.5
        if number == 19:
            group["weight_decay"] = 0.0  # with "l2", there is no penalty from here on
        if number == 24:
            group["weight_decay"] = 0.3
        self.step(bad={5: 0, 12: 3, 17: 1}.get(number), missing={7: 1, 16: 3}.get(number))

    def seen(self) -> list[Tensor]:
        states = self.optimizer.state_dict()["state"]
        kept = [x.clone() for i in sorted(states) for _, x in sorted(states[i].items())]
        return [p.detach().clone() for p in self.params] + kept

    def recordings(self) -> list[graphs.Recording]:
        found = [stack.recorder.recording for stack in self.optimizer._stacks]
        return [one for one in found if one is not None]

    def spoil(self) -> None:
        """Whoever reads what a replay has left behind, or was given last time, reads NaN."""
        for one in self.recordings():
            for x in one.inputs.tensors:
                x.fill_(math.nan if x.is_floating_point() else 0)
            for x in graphs._tensors(one.made):
                x.fill_(math.nan)


def expect_same(ours: Training, theirs: Training) -> None:
    for x, y in zip(ours.seen(), theirs.seen(), strict=True):
        assert torch.equal(x, y), f"otherwise after step {ours.number}"


# Recorded.


@pytest.mark.usefixtures("finding")
@pytest.mark.parametrize("name", list(VARIANTS))
def test_replays_are_the_same_to_the_last_bit(name: str, tape: Tape) -> None:
    recorded, plain = Training(name, cuda_graph=True), Training(name)
    for number in range(30):
        recorded.eventful(number)
        plain.eventful(number)
        expect_same(recorded, plain)
        recorded.spoil()
    assert recorded.optimizer.skipped == plain.optimizer.skipped == 3
    if name in RECORDED:
        assert tape.replays >= 10, "hardly anything was replayed"
        assert len(recorded.recordings()) == 3
    else:
        assert tape.captures == 0, "an update with a solver in it was recorded"


def test_who_is_recorded_and_when(tape: Tape) -> None:
    training = Training("soap")  # refreshes every three steps
    training.optimizer.param_groups[0]["cuda_graph"] = True
    counts = []
    for _ in range(10):
        before = tape.replays
        training.step()
        counts.append(tape.replays - before)
    assert counts == [0, 0, 0, 0, 2, 2, 0, 2, 2, 0], "two of each run operation by operation, refreshes always do"
    assert tape.captures == 2


def test_another_run_in_between_leaves_the_recording(tape: Tape) -> None:
    training = Training("muon", cuda_graph=True)
    for _ in range(4):
        training.step()
    assert (tape.captures, tape.replays) == (2, 4)
    training.step(missing=2)
    assert (tape.captures, tape.replays) == (2, 5), "without one matrix it is another update"
    training.step()
    assert (tape.captures, tape.replays) == (2, 7)
    for _ in range(4):
        training.step(missing=2)
    assert (tape.captures, tape.replays) == (3, 13), "once it stays, it is recorded in its turn"
    training.optimizer.param_groups[0]["cuda_graph"] = False
    training.step(missing=2)
    assert tape.replays == 13


def test_options_that_change_in_each_step_are_not_recorded(tape: Tape) -> None:
    training = Training("muon", cuda_graph=True)
    for k in range(8):
        training.optimizer.param_groups[0]["momentum"] = 0.9 + 0.01 * k
        training.step()
    assert tape.captures == 0


def test_a_capture_that_fails_is_said_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RuntimeError("operation not permitted")

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    tried, plain = Training("muon", cuda_graph=True), Training("muon")
    for number in range(6):
        if number == 2:
            with pytest.warns(UserWarning, match="cuda_graph=True: an update can't be recorded.*not permitted"):
                tried.step()
        else:
            tried.step()
        plain.step()
        expect_same(tried, plain)


def test_where_nothing_can_be_recorded_it_changes_nothing() -> None:
    asked, plain = Training("soap", cuda_graph=True), Training("soap")
    for _ in range(6):
        asked.step()
        plain.step()
    expect_same(asked, plain)
    assert not asked.recordings()


def test_recordings_stay_behind(tape: Tape) -> None:
    """Copies, pickles and saved states have none, and what is loaded into a recorded stack counts."""
    first = Training("soap", cuda_graph=True)
    for _ in range(6):
        first.step()
    assert first.recordings()
    copied = copy.deepcopy(first)
    through = pickle.loads(pickle.dumps((first.optimizer, first.params)))
    pickled = Training("soap")
    pickled.optimizer, pickled.params, pickled.number = through[0], through[1], first.number
    assert not copied.recordings()
    assert not pickled.recordings()
    saved, weights = copy.deepcopy(first.optimizer.state_dict()), [p.detach().clone() for p in first.params]
    for training in (first, copied, pickled):
        for _ in range(6):
            training.step()
    expect_same(copied, first)
    expect_same(pickled, first)
    assert copied.recordings()
    again = Training("soap", cuda_graph=True)
    for _ in range(8):
        again.step()
    assert again.recordings()
    again.optimizer.load_state_dict(saved)
    for p, W in zip(again.params, weights, strict=True):
        p.data.copy_(W)
    again.number = 6
    for _ in range(6):
        again.step()
    expect_same(again, first)


# The options.


@pytest.mark.parametrize("name", ["compile", "cuda_graph"])
@pytest.mark.parametrize("value", [1, "auto", None])
def test_a_value_that_is_no_bool_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be a bool"):
        steepest.Muon([nn.Parameter(torch.zeros(2, 2))], **{name: value})


def test_what_was_saved_without_them_goes_on() -> None:
    training = Training("muon")
    training.step()
    old = copy.deepcopy(training.optimizer.state_dict())
    pickled = training.optimizer.__getstate__()
    for group in (*old["param_groups"], *pickled["param_groups"]):
        del group["compile"], group["cuda_graph"]
    fresh = Training("muon", cuda_graph=True)
    fresh.optimizer.load_state_dict(old)
    assert fresh.optimizer.param_groups[0]["cuda_graph"] is True
    training.optimizer.__setstate__(pickled)
    training.step()


# Compiled.


class Backend:
    """Runs graphs operation by operation; notes how many are made and run, and at what precision products are."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0
        self.precisions: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        multiplies = any(word in str(node.target) for node in graph.graph.nodes for word in ("matmul", "bmm"))

        def run(*args: Any) -> Any:
            self.runs += 1
            if multiplies:
                self.precisions.add(torch.get_float32_matmul_precision())
            return graph.forward(*args)

        return run


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    torch._dynamo.reset()
    backend = Backend()
    monkeypatch.setattr(graphs, "BACKEND", backend)
    return backend


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


@pytest.mark.parametrize("name", ["soap", "soap kl", "inverse_root", "adamuon", "dion2"])
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


@pytest.mark.parametrize("name", ["soap", "soap kl", "muon"])
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


@pytest.mark.usefixtures("finding")
@pytest.mark.parametrize("name", ["soap", "adamuon"])
def test_both_at_once(name: str, tape: Tape, backend: Backend) -> None:
    both, compiled = Training(name, compile=True, cuda_graph=True), Training(name, compile=True)
    for number in range(30):
        both.eventful(number)
        compiled.eventful(number)
        expect_same(both, compiled)
        both.spoil()
    assert tape.replays >= 10


def inductor(name: str) -> None:
    torch._dynamo.reset()
    compiled, plain = Training(name, compile=True), Training(name)
    for _ in range(5):
        compiled.step()
        plain.step()
    for p, q in zip(compiled.params, plain.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_inductor_agrees() -> None:
    inductor("soap")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIANTS))
def test_inductor_agrees_on_every_rule(name: str) -> None:
    inductor(name)


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("name", list(VARIANTS))
def test_replays_on_a_gpu_are_the_same_to_the_last_bit(name: str) -> None:
    recorded, plain = Training(name, "cuda", cuda_graph=True), Training(name, "cuda")
    for number in range(30):
        recorded.eventful(number)
        plain.eventful(number)
        expect_same(recorded, plain)
        recorded.spoil()
    assert len(recorded.recordings()) == (3 if name in RECORDED else 0)


@needs_cuda
def test_compiled_replays_on_a_gpu() -> None:
    both, compiled = Training("soap", "cuda", compile=True, cuda_graph=True), Training("soap", "cuda", compile=True)
    for number in range(30):
        both.eventful(number)
        compiled.eventful(number)
        expect_same(both, compiled)
    assert both.recordings()
