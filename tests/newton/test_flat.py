"""What all optimizers of one vector check, shown on the simplest."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from steepest.newton import flat as module
from steepest.newton.flat import FlatOptimizer


class Nudge(FlatOptimizer):
    """It moves all weights by a number, which it keeps as a vector."""

    checks: ClassVar = {"by": (lambda x: x > 0, "a number above 0")}

    vectors: ClassVar = ("moved",)

    def __init__(self, params, by=1.0):
        super().__init__(params, {"by": by})

    def _layout(self, length):
        return {"step": (), "moved": (length,)}

    def step(self, closure=None):
        self._check()
        with self._restoring() as before:
            self._move_to(before + self.options["by"])
            if closure is not None:
                closure()
        self._memory()["moved"].copy_(self._weights() - before)


def parameters(*shapes, dtype=torch.float64):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def test_the_vector_joins_what_is_trainable_in_order():
    a, b, c = parameters((2,), (3, 2), (1,))
    b.requires_grad_(False)
    optimizer = Nudge([{"params": [a, b]}, {"params": [c]}])
    optimizer._move_to(torch.arange(3.0))
    assert (a.tolist(), b.sum().item(), c.tolist()) == ([0.0, 1.0], 0.0, [2.0])
    assert optimizer._weights().tolist() == [0.0, 1.0, 2.0]
    assert optimizer._join([None, torch.ones(1)]).tolist() == [0.0, 0.0, 1.0]


def test_an_error_puts_the_weights_back():
    (a,) = parameters((3,))
    optimizer = Nudge([a])

    def fail():
        assert a.tolist() == [1.0, 1.0, 1.0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    assert a.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (lambda: [*parameters((2,)), *parameters((2,), dtype=torch.float32)], "must be of one dtype"),
        (lambda: parameters((2,), dtype=torch.complex64), "only real numbers"),
        (
            lambda: [*parameters((2,)), nn.Parameter(torch.zeros(2, device="meta").double())],
            "on one device",
        ),
        (lambda: [{"params": parameters((1,)), "by": 0.0}], "by=0.0: must be a number above 0"),
        (lambda: [{"params": parameters((1,))}, {"params": parameters((1,)), "by": 3.0}], "by=3.0 in group 1, 1.0 in"),
    ],
)
def test_what_makes_no_vector_is_refused(params, words):
    with pytest.raises(ValueError, match=words):
        Nudge(params())


def test_a_group_that_is_refused_is_not_added():
    optimizer = Nudge(parameters((1,)))
    with pytest.raises(ValueError, match=r"by=2\.0 in group 1"):
        optimizer.add_param_group({"params": parameters((2,)), "by": 2.0})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(module, "is_dtensor", lambda p: p.dim() == 2)
    Nudge(parameters((1,)))
    with pytest.raises(RuntimeError, match="works on one rank only"):
        Nudge(parameters((1, 1)))


def test_a_state_of_another_shape_is_refused_and_nothing_changes():
    optimizer, other, halves = Nudge(parameters((3,))), Nudge(parameters((2,))), Nudge(parameters((1,), (2,)))
    for one in (optimizer, other, halves):
        one.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"moved of Nudge's state is \[2\], must be a tensor of shape \[3\]"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"groups have \[2\] parameters, the optimizer's groups have \[1\]"):
        optimizer.load_state_dict(halves.state_dict())
    assert torch.equal(optimizer.state_dict()["state"][0]["moved"], before["state"][0]["moved"])


def test_copies_know_what_they_check():
    copied = copy.deepcopy(Nudge(parameters((1,))))
    copied.step()
    copied.param_groups[0]["by"] = -1.0
    with pytest.raises(ValueError, match=r"by=-1\.0"):
        copied.step()
