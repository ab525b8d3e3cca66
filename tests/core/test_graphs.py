"""Updates that are compiled or recorded as graphs have the same bits as without; which are recorded, and when."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from training_in_graphs import RECORDED, VARIANTS, Backend, Training, expect_same

import steepest
from steepest.linalg import attempts
from steepest.stack import graphs


class Tape:
    """A stand-in for CUDA graphs whose replay does the recorded work again, on the same memory."""

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
    """Find gradients that are not finite as on a CPU, and as on accelerators."""
    if request.param == "masks":
        monkeypatch.setattr(attempts, "at_hand", lambda x: False)


# Recordings.


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


def test_which_updates_are_recorded_and_when(tape: Tape) -> None:
    training = Training("soap")  # refreshes every three steps
    training.optimizer.param_groups[0]["cuda_graph"] = True
    counts = []
    for _ in range(10):
        before = tape.replays
        training.step()
        counts.append(tape.replays - before)
    assert counts == [0, 0, 0, 0, 2, 2, 0, 2, 2, 0], "two of each kind run without, and refreshes always do"
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
    assert (tape.captures, tape.replays) == (3, 13), "once it comes in a row, it is recorded"
    training.optimizer.param_groups[0]["cuda_graph"] = False
    training.step(missing=2)
    assert tape.replays == 13


def test_options_that_change_in_each_step_are_not_recorded(tape: Tape) -> None:
    training = Training("muon", cuda_graph=True)
    for k in range(8):
        training.optimizer.param_groups[0]["momentum"] = 0.9 + 0.01 * k
        training.step()
    assert tape.captures == 0


def test_a_capture_that_fails_warns_once_and_the_update_runs(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Copies, pickles and saved states have no recordings, and a state that is loaded into a recorded stack counts."""
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


# Options.


@pytest.mark.parametrize("name", ["compile", "cuda_graph"])
@pytest.mark.parametrize("value", [1, "auto", None])
def test_a_value_that_is_no_bool_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be a bool"):
        steepest.Muon([nn.Parameter(torch.zeros(2, 2))], **{name: value})


def test_a_state_that_was_saved_without_the_options_loads() -> None:
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


@pytest.mark.usefixtures("finding")
@pytest.mark.parametrize("name", ["soap", pytest.param("adamuon", marks=pytest.mark.slow)])
def test_both_at_once(name: str, tape: Tape, backend: Backend) -> None:
    both, compiled = Training(name, compile=True, cuda_graph=True), Training(name, compile=True)
    for number in range(30):
        both.eventful(number)
        compiled.eventful(number)
        expect_same(both, compiled)
        both.spoil()
    assert tape.replays >= 10


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


def test_options_that_change_in_every_step_do_not_compile_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(graphs, "_compile", lambda rule: made.append(rule) or rule.update)
    monkeypatch.setattr(graphs, "_compiled", deque())
    monkeypatch.setattr(graphs, "_changes", {})
    training = Training("muon", compile=True)
    training.step()
    shapes = len(made)
    for k in range(1, graphs.MOST):
        training.optimizer.param_groups[0]["momentum"] = 0.8 + k / 100
        training.step()
    assert len(made) == shapes * graphs.MOST
    for k in range(20):
        training.optimizer.param_groups[0]["momentum"] = 0.9 + k / 1000
        if k == 0:
            with pytest.warns(UserWarning, match="options of muon have changed 8 times in a row"):
                training.step()
        else:
            training.step()
    assert len(made) == shapes * graphs.MOST
    for _ in range(3):  # once they stay
        training.step()
    assert len(made) == shapes * (graphs.MOST + 1)
