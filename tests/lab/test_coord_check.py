"""The command ``steepest coord-check``: what it measures, what theory says about it, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.coordcheck.command import parse_widths
from steepest.lab.coordcheck.families import family
from steepest.lab.coordcheck.sizes import Growth, Sizes, exponent, growth, rms, sizes, trainable_layers
from steepest.lab.coordcheck.text import table
from steepest.lab.shared.contenders import preset
from steepest.lab.shared.errors import BadInput
from steepest.lab.workloads.workload import Workload

MODEL = """
import torch
from torch import nn

def model(width):
    hidden = nn.Linear(width, width, bias=False)
    return nn.Sequential(nn.Linear(6, width, bias=False), nn.Tanh(), hidden, nn.Tanh(), nn.Linear(width, 3))

def batch(generator):
    x = torch.randn(256, 6, generator=generator)
    return x, x[:, :3] * x[:, 3:]

def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()

def narrow(width):
    return nn.Linear(6, 3)

def no_width():
    return model(8)

def no_module(width):
    return width

def broken(width):
    raise RuntimeError("heads don't divide")

def deeper(width):
    return nn.Sequential(nn.Linear(6, width), *(nn.Linear(width, 3) if width < 16 else nn.Linear(width, width),))
"""


@pytest.fixture
def my_model(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


def coord_check(*arguments: object):
    return CliRunner().invoke(app, ["coord-check", *map(str, arguments)], env={"COLUMNS": "80"})


def powers(of: str, optimizer: str) -> dict[str, dict[str, float]]:
    done = coord_check(of, "--optimizer", optimizer, "--widths", "16,64,128", "--steps", 1, "--json")
    assert done.exit_code == 0, done.output
    return {line["layer"]: line["powers"] for line in json.loads(done.stdout)}


def test_the_powers_are_those_of_theory(my_model) -> None:
    """A hidden matrix of width n, whose inputs have entries of size 1, changes its outputs

    - by n · lr under AdamW, whose steps have entries of size lr and are aligned with the inputs (arXiv:2203.03466);
    - by spectral norm: sqrt(n) · 0.2 lr under Muon, lr under Muon with the scale "mup" (arXiv:2310.17813).
    """
    for optimizer, change in {
        "adamw": 1.0,
        "muon(ns_dtype='float32')": 0.5,
        "muon(scale='mup', ns_dtype='float32')": 0.0,
    }.items():
        found = powers(my_model, optimizer)["2"]
        assert found["change"] == pytest.approx(change, abs=0.2), optimizer
        assert found["size"] == pytest.approx(0.0, abs=0.2), optimizer
    assert powers(my_model, "adamw")["2"]["update"] == pytest.approx(0.5, abs=0.1)  # entries of W are like 1 / sqrt(n)


class OneLayer(Workload):
    """Least squares by one matrix."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4, bias=False))

    def batch(self, generator):
        return torch.randn(7, 5, generator=generator)

    def loss(self, model, batch):
        return (model(batch) - batch[:, :4]).square().mean()

    def validation(self, model):
        return 0.0


def test_sizes_are_what_a_plain_loop_gives() -> None:
    contender, workload = preset("adamw").varied(lr=0.1), OneLayer()
    torch.manual_seed(3)
    model, data = workload.model(), torch.Generator().manual_seed(3)
    W = model[0].weight
    before = W.detach().clone()
    optimizer = torch.optim.AdamW([W], lr=0.1, betas=(0.7, 0.95), weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        workload.loss(model, workload.batch(data)).backward()
        optimizer.step()
    x = workload.batch(torch.Generator().manual_seed(4))
    moved = W.detach() - before
    expected = (
        (moved.norm() / before.norm()).item(),
        ((x @ moved.T).square().mean() / x.square().mean()).sqrt().item(),
        (x @ W.detach().T).square().mean().sqrt().item(),
    )
    (found,) = sizes(workload, contender, steps=4, seed=3).values()
    assert astuple(found) == pytest.approx(expected, rel=1e-4)


class Odd(Workload):
    """A table, a recurrent layer, a norm, a frozen layer, the model's own parameter, and a layer that is not called."""

    def model(self) -> nn.Module:
        return OddModel()

    def batch(self, generator):
        return torch.randint(9, (3, 5), generator=generator)

    def loss(self, model, batch):
        return (model(batch) - 1).square().mean()

    def validation(self, model):
        return 0.0


class OddModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.lstm = nn.Embedding(9, 6), nn.LayerNorm(6), nn.LSTM(6, 6, batch_first=True)
        self.frozen, self.unused = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        y, _ = self.lstm(self.norm(self.table(x)))
        return self.frozen(y) + self.shift + self.unused.weight.sum()


def test_every_kind_of_layer_is_measured_as_far_as_it_can_be() -> None:
    found = sizes(Odd(), preset("adamw"), steps=2)
    assert list(found) == ["OddModel", "table", "norm", "lstm", "unused"]
    assert all(value is not None and value > 0 for name in ("table", "norm", "lstm") for value in astuple(found[name]))
    assert found["OddModel"].update is None  # its parameter was zero
    assert found["unused"].update is not None
    assert astuple(found["unused"])[1:] == (None, None)
    assert found["norm"].size == pytest.approx(1, rel=0.2)


def test_the_model_is_measured_in_eval_mode() -> None:
    """A dropout before the layer would make its inputs, and so its outputs, larger by the root of two."""

    class Dropping(OneLayer):
        def model(self):
            return nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 4, bias=False))

    dropping = sizes(Dropping(), preset("adamw").varied(lr=1e-6), steps=1)["1"]
    assert dropping.size == pytest.approx(
        sizes(OneLayer(), preset("adamw").varied(lr=1e-6), steps=1)["0"].size, rel=1e-3
    )


def test_a_layer_that_is_called_twice_is_measured_at_its_first_call() -> None:
    class Twice(OneLayer):
        def model(self):
            return nn.Sequential(nn.Linear(5, 5, bias=False))

        def loss(self, model, batch):
            return (model(100 * model(batch)) - batch).square().mean()

    assert sizes(Twice(), preset("adamw"), steps=1)["0"].size < 10


def test_exponents_and_flags() -> None:
    assert exponent({8: 3.0, 16: 3.0, 64: 3.0}) == pytest.approx(0)
    assert exponent({8: 1.0, 32: 0.5}) == pytest.approx(-0.5)
    assert exponent({8: None, 32: 0.5}) is None

    def grows(change: float, size: float) -> Growth:
        at = {width: Sizes(width**-0.5, width**change, width**size) for width in (16, 64)}
        return Growth("layer", at)

    assert grows(0.24, -0.24).flags == {}
    assert grows(0.26, -0.26).flags == {"change": pytest.approx(0.26), "size": pytest.approx(-0.26)}
    (row,) = table([grows(0.5, 0.0)]).rows
    assert row[-3:] == ["+0.50!", "1", "0.00 "]


def test_the_table_fits_80_columns_and_names_what_moves(my_model) -> None:
    done = coord_check(my_model, "--optimizer", "adamw(lr=1e-3)", "--widths", "8, 32,128", "--steps", 2)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    for layer in ("0", "2", "4"):
        assert any(line.split()[:1] == [layer] for line in done.stdout.splitlines())
    assert "widths 8, 32, 128: adamw(lr=0.001) lr 0.001" in " ".join(done.stdout.split())
    assert "of 3 layers move with the width" in done.stdout


def test_workloads_with_a_width_are_families(tmp_path) -> None:
    assert count(family("stdlib(depth=1)")(32)) < count(family("stdlib(depth=2)")(32)) < count(family("stdlib")(64))
    path = tmp_path / "my_task.py"
    path.write_text(TASK)
    assert count(family(str(path))(8)) == count(family(f"{path}:Task")(8)) == 8 * 8


TASK = """
from torch import nn
from steepest.lab import Workload

class Task(Workload):
    def __init__(self, width: int = 4):
        self.width = width
    def model(self):
        return nn.Linear(self.width, self.width, bias=False)
    def batch(self, generator): ...
    def loss(self, model, batch): ...
    def validation(self, model): ...
"""


def count(workload: Workload) -> int:
    return sum(p.numel() for p in workload.model().parameters())


def test_initial_weights_follow_the_seed(my_model) -> None:
    """The model is made after the random state is seeded, at each call."""
    of = family(f"{my_model}:model")
    one, same, other = (sizes(of(8), preset("adamw"), 1, seed) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("{file}:no_width", "no_width() must take one argument, the width; write `def no_width(width):`"),
        ("{file}:nothing", "defines no function nothing(width)"),
        ("{file}:no_module", "no_module() returned int, not a torch.nn.Module"),
        ("{file}:broken", "broken(8) failed: RuntimeError: heads don't divide"),
        ("{file}:narrow", "models of different widths have equally many parameters"),
        ("{file}:deeper", "RuntimeError"),
        ("nowhere.py:model", "model file nowhere.py: no such file"),
        ("nowhere", "unknown workload 'nowhere'"),
        ("pinn(width=3", "options are names and plain values"),
    ],
)
def test_models_without_a_width_are_refused_with_the_remedy(my_model, model, complaint) -> None:
    done = coord_check(model.format(file=my_model), "--widths", "8,16", "--steps", 1)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert complaint in line


def test_a_workload_without_a_width_is_refused_with_the_remedy(tmp_path) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(TASK.replace("width: int = 4", "size: int = 4").replace("self.width = width", "self.width = size"))
    with pytest.raises(BadInput, match=r"has only size; a check over widths needs an option width: .*`def __init__"):
        family(str(path))


def test_a_module_needs_a_batch_and_a_loss(tmp_path) -> None:
    path = tmp_path / "bare.py"
    path.write_text("from torch import nn\ndef model(width):\n    return nn.Linear(width, width)\n")
    with pytest.raises(BadInput, match=r"defines no function batch\(generator\) and no loss\(model, batch\)"):
        family(str(path))(8)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--widths", "32"), "--widths 32: must be at least two different positive integers"),
        (("--widths", "32,32"), "at least two different"),
        (("--widths", "32,x"), "positive integers, as in 32,64,128"),
        (("--widths", "0,32"), "positive integers"),
        (("--optimizer", "adamw, muon"), "--optimizer adamw, muon: give one"),
        (("--optimizer", "moun"), "unknown optimizer 'moun'"),
        (("--optimizer", "muon(scale='big')"), "scale"),
        (("--optimizer", "adamw(lr=1e30)", "--steps", 20), "lower the rate, adamw(lr=1e-3)"),
    ],
)
def test_bad_options_are_refused_in_one_line(my_model, options, complaint) -> None:
    done = coord_check(my_model, *(options if "--widths" in options else ("--widths", "8,16", *options)))
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert complaint in line


def test_widths_with_different_layers_are_refused() -> None:
    nothing = Sizes(None, None, None)
    with pytest.raises(BadInput, match=r"different layers \(b\): vary the width only"):
        growth({8: {"a": nothing}, 16: {"a": nothing, "b": nothing}})


def test_small_things() -> None:
    assert parse_widths("64,32, 32") == [32, 64]
    assert rms([torch.full((3,), -2.0)]) == 2.0
    assert list(trainable_layers(nn.Linear(2, 2))) == ["Linear"]
