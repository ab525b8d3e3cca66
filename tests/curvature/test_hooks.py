"""Hooks go with their curvature, and cost nothing while it doesn't listen."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from checked import Checked, loss_of, mlp
from torch import nn

from steepest.curvature import Curvature
from steepest.curvature.taps import Hook

X = torch.randn(6, 4)


def hooks(model: nn.Module) -> int:
    """How many are on any module."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, name)) for module in model.modules() for name in kept)


def saved(model: nn.Module) -> int:
    """How many tensors a forward pass saves for the backward pass."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        model(X)
    return len(packed)


@pytest.mark.parametrize("how", ["detach", "garbage"])
def test_no_hook_is_left(how):
    model = mlp()
    curvature = Curvature(model)
    curvature.listening = True
    assert hooks(model) == 8
    loss = loss_of(model(X))
    if how == "detach":
        curvature.detach()
        curvature.detach()
    else:
        del curvature
        gc.collect()
    assert hooks(model) == 0
    loss.backward()  # a graph with taps in it is of use still
    loss_of(model(X)).backward()


def test_hooks_that_are_removed_while_a_module_calls_its_hooks():
    """As garbage collection may do it."""
    model = mlp()
    curvature = Curvature(model, loss_terms=6)
    curvature.listening = True
    model[2].register_forward_hook(lambda *_: curvature.detach(), prepend=True)
    loss_of(model(X)).backward()
    assert model[2].weight not in curvature.collect()


def test_a_curvature_keeps_no_graph_alive_and_hooks_keep_no_curvature():
    model = mlp()
    curvature = Curvature(model)
    curvature.listening = True
    outputs = model(X)
    node = weakref.ref(outputs.grad_fn)
    del outputs
    assert node() is None
    reference = weakref.ref(curvature)
    del curvature
    assert reference() is None  # at once: there is no cycle


def test_nothing_is_saved_while_it_does_not_listen():
    model = mlp()
    plain = saved(model)
    curvature = Curvature(model)
    assert saved(model) == plain
    curvature.listening = True
    assert saved(model) == plain + 3
    model.eval()
    assert saved(model) == plain
    model.train()
    with torch.no_grad():
        assert saved(model) == 0


def test_inputs_are_not_kept_after_the_backward_pass():
    model = mlp()
    curvature = Curvature(model)
    curvature.listening = True
    x = torch.randn(6, 4)
    reference = weakref.ref(x)
    loss_of(model(x)).backward()
    del x
    assert reference() is None
    assert len(curvature.collect()) == 3


def test_copies_of_the_model_are_not_heard():
    model = mlp()
    curvature = Checked(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        loss_of(other(X)).backward()
        assert curvature.calls == {}
        found = Checked(other)  # hooks without effect make room
        assert hooks(other) == 8
        loss_of(other(X)).backward()
        found_calls = found.calls
        found.detach()
        assert set(found_calls.values()) == {1}
        assert hooks(other) == 0


def test_a_loaded_hook_takes_no_other_hooks_number(monkeypatch):
    """Hooks are numbered by process. A new one must not take the place, or the way of calling, of a loaded one."""
    model = nn.Linear(4, 3)
    curvature = Curvature(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    number = next(iter(model._forward_hooks))
    monkeypatch.setattr("torch.utils.hooks.RemovableHandle.next_id", number)  # a process that has made fewer
    loaded = torch.load(file, weights_only=False)
    called = []
    loaded.register_forward_hook(lambda module, args, output: called.append(len(args)))
    loaded(X)
    assert called == [1]
    curvature.detach()


def test_two_curvatures_of_one_model():
    model = mlp()
    first, second = Checked(model), Checked(model, fisher="sampled", sharing="reduce")
    outputs = model(X)
    second.sample(outputs, "normal")
    assert first.calls == {}
    assert set(second.calls.values()) == {1}
    loss_of(outputs).backward()
    first.check()
    assert set(second.calls.values()) == {1}
    first.detach()
    loss_of(model(X)).backward()
    assert set(first.calls.values()) == {1}


def test_a_hook_that_does_not_listen_asks_one_question(monkeypatch):
    model = mlp()
    curvature = Curvature(model)
    asked = []
    monkeypatch.setattr(Hook, "heard", lambda *_: pytest.fail("heard"))
    curvature.listening = lambda: asked.append(1) and False
    model(X)
    assert len(asked) == 4  # three layers and the model


def test_uncalled_layers_are_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model = Net()
    curvature = Checked(model)
    assert curvature.uncalled() == ["used", "unused"]
    loss_of(model(X)).backward()
    assert curvature.uncalled() == ["unused"]
    curvature.collect()
    assert curvature.uncalled() == ["unused"]
