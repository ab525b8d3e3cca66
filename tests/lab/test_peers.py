"""Optimizers of other libraries as contenders: a stand-in for a library here, and the library where it is installed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import steepest
from steepest.cli import app
from steepest.lab.race.meters import state_bytes
from steepest.lab.race.pool import Pool
from steepest.lab.race.training import Schedule, train
from steepest.lab.race.trial import Trial
from steepest.lab.shared import peers
from steepest.lab.shared.contenders import parse_contenders, preset
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.peers import RACING
from steepest.lab.shared.presets import PRESETS
from steepest.lab.suite import command
from steepest.lab.workloads.workload import load_workload

STAND_IN = """
import torch

class WrongBetas(Exception):
    pass

class _Signs(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, **rest):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **rest))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("bases", [torch.zeros(3), torch.zeros(2)])
                p -= group["lr"] * p.grad.sign()

class SOAP(_Signs):
    def __init__(self, params, lr, betas, eps, weight_decay, shampoo_beta, precondition_frequency,
                 max_precondition_dim, merge_dims, **ignored):
        if betas[0] >= 1:
            raise WrongBetas("beta1 is too large")
        super().__init__(params, lr, weight_decay, betas=betas, every=precondition_frequency)

class Muon(_Signs):
    def __init__(self, params, lr, momentum, weight_decay, nesterov, use_adjusted_lr, **ignored):
        assert all(group["use_muon"] for group in params)
        super().__init__(params, lr, weight_decay, momentum=momentum)

class ScheduleFreeAdamW(_Signs):
    modes = []

    def __init__(self, params, lr, betas, eps, weight_decay, **ignored):
        super().__init__(params, lr, weight_decay, betas=betas)

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package of the library's name whose optimizers step along the signs of gradients."""
    (tmp_path / "pytorch_optimizer").mkdir()
    (tmp_path / "pytorch_optimizer" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "pytorch_optimizer-9.9.dist-info").mkdir()
    (tmp_path / "pytorch_optimizer-9.9.dist-info" / "METADATA").write_text("Name: pytorch_optimizer\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    peers.version_of.cache_clear()
    yield
    peers.version_of.cache_clear()
    sys.modules.pop("pytorch_optimizer", None)


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    find = peers.importlib.util.find_spec
    monkeypatch.setattr(
        peers.importlib.util, "find_spec", lambda name: None if name == "pytorch_optimizer" else find(name)
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", RACING)
def test_peers_have_the_settings_of_our_preset(name) -> None:
    theirs, ours = preset(name), PRESETS[RACING[name][1]]
    same = theirs.options.keys() & ours.options.keys()
    assert {"lr", "weight_decay"} < same
    assert {option: theirs.options[option] for option in same} == {option: ours.options[option] for option in same}
    assert (theirs.elementwise, theirs.warmup, theirs.rates) == (ours.elementwise, ours.warmup, ours.rates)
    assert theirs == preset(name.replace("muon", "Muon").replace("soap", "SOAP"))
    assert theirs.settings()["version"] == "9.9"
    assert "version" not in preset("soap").settings()


@pytest.mark.usefixtures("stand_in")
def test_a_peer_steps_what_routing_gives_to_ours_and_ours_steps_the_rest(model) -> None:
    (contender,) = parse_contenders("pytorch_optimizer.muon(lr=0.5, elementwise={'lr': 0.25})")
    assert contender.label == "pytorch_optimizer.muon(lr=0.5, elementwise={'lr': 0.25})"
    optimizer, routing = contender.optimizer(model), steepest.route(model, "muon")
    hidden = {row.name for row in routing if row.rule == "muon"}
    assert hidden == {"1.weight", "3.weight"}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == len(routing)
    ours = steepest.for_model(model, "muon", lr=0.5, weight_decay=0.1, elementwise=contender.elementwise)
    for group in ours.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert rates[id(p)] == (0.5 if name in hidden else 0.25)
            assert decays[id(p)] == group["weight_decay"]

    Schedule(optimizer, warmup=0.5, length=10).set(1)  # a fifth of the highest rate
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (before[name] - p.detach()).mean().item()
        assert moved == pytest.approx(0.1 if name in hidden else 0.05, rel=0.2), name  # AdamW decays, too
    assert set(optimizer.state) == set(model.parameters())
    of_adamw = sum(2 * 4 * p.numel() + 4 for name, p in model.named_parameters() if name not in hidden)
    assert state_bytes(optimizer) == of_adamw + len(hidden) * 5 * 4


@pytest.mark.usefixtures("stand_in")
def test_an_average_of_weights_is_validated_and_its_rate_stays(quick_task) -> None:
    contender, path = preset("pytorch_optimizer.schedule_free"), str(quick_task())
    rates = []

    def note(done: object) -> None:
        rates.append(optimizers[-1].param_groups[0]["lr"])

    optimizers: list[torch.optim.Optimizer] = []
    make = peers.Peer.make
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.Peer, "make", lambda *args: optimizers.append(make(*args)) or optimizers[-1])
        train(Trial(path, contender, steps=20, seed=0), load_workload(path), note)
    assert len(optimizers[-1].param_groups[0]["params"]) == len(list(load_workload(path).model().parameters()))
    assert rates[5:] == [contender.lr] * 15  # after the warm-up
    assert rates[0] == pytest.approx(contender.lr / 6)
    modes = optimizers[-1].modes
    assert modes == ["eval", "train"] * (len(modes) // 2)
    assert len(modes) == 2 * 12


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("max_precond_dim=3", "max_precond_dim=3: pytorch_optimizer.SOAP has no such option (did you mean 'max_"),
        ("betas=(2.0, 0.9)", "WrongBetas: beta1 is too large"),
        ("lr=-1.0", "lr=-1.0: must be a finite number >= 0"),
        ("elementwise={'nonsense': 1}", "nonsense=1: adamw has no such option"),
    ],
)
def test_options_that_a_peer_has_not_are_refused(model, options, complaint) -> None:
    (contender,) = parse_contenders(f"pytorch_optimizer.soap({options})")
    with pytest.raises(BadInput) as caught:
        contender.check(model)
    assert complaint in str(caught.value)


@pytest.mark.usefixtures("absent")
def test_a_library_that_is_not_there_is_named() -> None:
    with pytest.raises(BadInput) as caught:
        parse_contenders("adamw, pytorch_optimizer.soap")
    assert str(caught.value) == (
        'optimizer pytorch_optimizer.soap: pytorch_optimizer is not installed; pip install "steepest[peers]"'
    )


def test_a_library_that_is_broken_is_named(stand_in, model, tmp_path) -> None:
    (tmp_path / "pytorch_optimizer" / "__init__.py").write_text("import nowhere")
    with pytest.raises(BadInput, match="No module named 'nowhere'; pip install"):
        preset("pytorch_optimizer.soap").check(model)


class Nothing(Pool):
    """A pool that is interrupted before its first run."""

    def run(self, trials, ended) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("installed", [True, False])
def test_the_suite_has_peers_where_they_are_installed_and_says_so(
    installed, request, monkeypatch, tmp_path, quick_task
) -> None:
    request.getfixturevalue("stand_in" if installed else "absent")
    monkeypatch.setattr(command, "Pool", Nothing)
    monkeypatch.setattr(command, "CONTENDERS", ("adamw", "soap-f5"))
    done = CliRunner().invoke(app, ["suite", "--workloads", str(quick_task()), "--out", str(tmp_path / "out")])
    assert done.exit_code == 130, done.output
    output = " ".join(done.output.split())
    named = f"adamw, soap-f5, {', '.join(RACING)} on quick_task"
    assert (named in output) == installed
    assert ("adamw, soap-f5 without" in output) == (not installed)
    remedy = f'without {", ".join(RACING)}, not installed: pip install "steepest[peers]"'
    assert (remedy in output) == (not installed)


def test_the_librarys_muon_takes_our_steps() -> None:
    """With the settings that it gets, so that its rates start where ours do."""
    pytest.importorskip("pytorch_optimizer")
    theirs, ours = preset("pytorch_optimizer.muon"), preset("muon")
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 64), (32, 64), (64, 32)):
        moved = []
        for contender in (theirs, ours):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(shape[1], shape[1]), nn.Linear(*shape[::-1]), nn.Linear(shape[0], 3))
            optimizer, before = contender.optimizer(model), model[1].weight.detach().clone()
            generator.manual_seed(0)
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            moved.append((model[1].weight.detach() - before).flatten())
        assert torch.cosine_similarity(*moved, dim=0) > 0.999
        assert moved[0].norm() == pytest.approx(moved[1].norm().item(), rel=0.01)


def test_the_librarys_soap_trains_like_ours() -> None:
    pytest.importorskip("pytorch_optimizer")
    ends = {}
    for name in ("pytorch_optimizer.soap", "soap-f10", "adamw"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        x, y = torch.randn(64, 8), torch.randn(64, 4)
        optimizer = preset(name).optimizer(model)
        for _ in range(40):
            loss = (model(x) - y).square().mean()
            model.zero_grad()
            loss.backward()
            optimizer.step()
        ends[name] = loss.item()
    assert ends["pytorch_optimizer.soap"] == pytest.approx(ends["soap-f10"], rel=0.2), ends
