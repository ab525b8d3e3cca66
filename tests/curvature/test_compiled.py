"""Models that torch.compile has compiled, before or after the hooks were put on."""

from __future__ import annotations

import pytest
import torch
from checked import Checked, Twice, loss_of

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))

HIDDEN = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by torch itself, elsewhere than here


@HIDDEN
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("first", ["hooks", "compile"])
def test_compiled_models(backend, first):
    torch._dynamo.reset()
    model = Twice()
    if first == "hooks":
        curvature = Checked(model)
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
        curvature = Checked(model)
    for listening in (True, False, True):
        curvature.listening = listening
        model.zero_grad()
        curvature.sums, curvature.calls = {}, {}
        loss_of(compiled(TOKENS)).backward()
        if listening:
            curvature.check()
        assert curvature.calls == ({"a": 2, "b": 1} if listening else {})


@HIDDEN
def test_samples_of_compiled_models():
    torch._dynamo.reset()
    model = Twice()
    curvature = Checked(model, fisher="sampled")
    outputs = torch.compile(model, backend="aot_eager")(X)
    curvature.sample(outputs, "categorical")
    loss_of(outputs).backward()
    assert curvature.calls == {"a": 2, "b": 1}


@HIDDEN
def test_graphs_compiled_before_the_hooks_are_not_heard():
    torch._dynamo.reset()
    model = Twice()
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled(X)).backward()
    curvature = Checked(model)
    loss_of(compiled(X)).backward()
    assert curvature.uncalled() == ["a", "b"]
