"""Which of a model's parameters K-FAC takes, as which matrices, and what it says about the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.curvature import layers
from steepest.engine import capturing

KINDS = {"kfac": steepest.KFAC, "ekfac": steepest.EKFAC}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A language model of a kind, with about everything that a layer can be."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.convolution = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.unbiased = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.norm(x + self.attention(x, x, x)[0])
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.convolution(x.mT).mT
        x = x + self.unbiased(x).relu()
        return torch.cat([self.out(x), self.head(x)], -1)


TOKENS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor = TOKENS) -> None:
    opt.zero_grad()
    outputs = model(x)
    (outputs - outputs.detach().cos()).square().sum(-1).mean().backward()
    opt.step()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rules(opt: torch.optim.Optimizer, model: nn.Module) -> dict[str, str]:
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["rule"] for group in opt.param_groups for p in group["params"]}


# Routing.


@pytest.mark.parametrize(
    ("name", "rule", "why"),
    [
        ("qkv.weight", "kfac", "Linear, with its bias"),
        ("qkv.bias", "kfac", "last column of qkv.weight"),
        ("convolution.weight", "kfac", "Conv1d, with its bias"),
        ("unbiased.weight", "kfac", "Linear"),
        ("head.weight", "kfac", "Linear, with its bias"),  # to SOAP's routing it is a head
        ("table.weight", "adamw", "a table's rows are looked up"),
        ("attention.in_proj_weight", "adamw", "calls no module for it"),
        ("attention.out_proj.weight", "adamw", "doesn't call this module"),
        ("attention.out_proj.bias", "adamw", "bias"),
        ("norm.weight", "adamw", "norm"),
    ],
)
def test_the_table_says_why(name, rule, why):
    row = next(row for row in steepest.route(Net(), "kfac").rows if row.name == name)
    assert row.rule == rule
    assert why in row.why


def test_tied_weights_are_elementwise():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    rows = {row.name: row for row in steepest.route(Tied(), "kfac").rows}
    assert rows["a.weight"].rule == "adamw"
    assert "shared with 'b'" in rows["a.weight"].why


@pytest.mark.parametrize("rule", KINDS)
def test_every_parameter_moves_under_its_rule(rule):
    model = Net()
    opt = KINDS[rule](model)
    before = values(model)
    for _ in range(2):
        step(model, opt)
    assert all(not torch.equal(p, before[name]) and p.isfinite().all() for name, p in values(model).items())
    routed = {row.name: row.rule for row in steepest.route(model, rule).rows}
    assert rules(opt, model) == routed
    assert set(routed.values()) == {rule, "adamw"}
    (group,) = (group for group in opt.param_groups if group["rule"] == "adamw")
    assert group["lr"] == 1e-3


def test_shapes_of_factors():
    model = Net()
    opt = steepest.KFAC(model, overrides={"head.weight": {"lr": 0.5}, "qkv.weight": {"split": (8, 8, 8)}})
    step(model, opt)
    shapes = {
        name: (tuple(opt.state[p]["A"].shape), tuple(opt.state[p]["B"].shape))
        for name, p in model.named_parameters()
        if "A" in opt.state[p]
    }
    assert shapes["convolution.weight"] == ((2, 13, 13), (2, 4, 4))
    assert shapes["unbiased.weight"] == ((8, 8), (8, 8))
    assert shapes["head.weight"] == ((9, 9), (5, 5))
    pieces = opt.state[model.qkv.weight]
    assert [(pieces[f"A.{k}"].shape, pieces[f"B.{k}"].shape) for k in range(3)] == [((9, 9), (8, 8))] * 3
    assert {"A", "B"}.isdisjoint(opt.state[model.head.bias])


# Frozen parameters.


def test_a_frozen_weight():
    model = mlp()
    model[0].weight.requires_grad_(False)
    opt = steepest.KFAC(model)
    before = values(model)
    step(model, opt, X)
    after = values(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])
    assert not torch.equal(before["0.bias"], after["0.bias"])
    assert rules(opt, model)["0.bias"] == "adamw"


def test_a_bias_that_freezes_while_its_weight_is_trained():
    model = mlp()
    opt = steepest.KFAC(model)
    step(model, opt, X)
    model[0].bias.requires_grad_(False)
    before = values(model)
    for _ in range(2):
        step(model, opt, X)
    assert torch.equal(before["0.bias"], model[0].bias)
    assert not torch.equal(before["0.weight"], model[0].weight)


@pytest.mark.parametrize("settle", [0, 50])
@pytest.mark.parametrize("left_out", [True, False])
def test_a_layer_that_thaws(left_out, settle):
    """It is captured when it is trained first, whatever the frequencies say; a group that was frozen settles anew."""
    model = mlp()
    frozen = {"params": [("0.weight", model[0].weight), ("0.bias", model[0].bias)], "bias": True}
    model[0].requires_grad_(not left_out)
    opt = steepest.KFAC(model, settle=settle, statistics_frequency=7)
    model[0].requires_grad_(False)
    if left_out:
        opt.add_param_group(frozen)
    for _ in range(3):
        step(model, opt, X)
    assert opt.wants_statistics is (settle > 0)
    before = values(model)
    model[0].requires_grad_(True)
    step(model, opt, X)
    waits = left_out or settle == 0  # nothing has been captured of it yet
    assert opt.wants_statistics
    assert torch.equal(values(model)["0.weight"], before["0.weight"]) is waits
    step(model, opt, X)
    assert opt.param_groups[-1]["statistics_step"] == (1 if waits else 5)
    assert opt.state[model[0].weight]["statistics"] == (1 if waits else 2)
    step(model, opt, X)
    after = values(model)
    assert all(not torch.equal(before[name], after[name]) and after[name].isfinite().all() for name in before)


# What is refused.


@pytest.mark.parametrize("name", ["table.weight", "attention.out_proj.weight"])
def test_overrides_of_what_can_not_be_captured(name):
    with pytest.raises(ValueError, match=rf"{name}: kfac by override: (a table's rows|MultiheadAttention)"):
        steepest.for_model(Net(), "kfac", overrides={name: "kfac"})


def test_parameters_of_no_layer():
    opt = steepest.KFAC(mlp())
    stranger = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(ValueError, match="in no layer that can be captured"):
        opt.add_param_group({"params": [("stranger", stranger)]})
    opt.add_param_group({"params": [("stranger", stranger)], "rule": "soap", "lr": 0.1})
    stranger.grad = torch.ones(3, 3)
    opt.step()
    assert stranger.isfinite().all()


def test_a_model_is_looked_through_once(monkeypatch):
    """Not for each of its parameters."""
    looks = []
    monkeypatch.setattr(capturing, "layers", lambda model: looks.append(1) or layers(model))
    counts = []
    for size in (2, 12):
        looks.clear()
        steepest.KFAC(nn.Sequential(*(nn.Linear(3, 3) for _ in range(size))))
        counts.append(len(looks))
    assert counts[0] == counts[1]


class Adapter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_A = torch.nn.Linear(12, 3, bias=False)
        self.lora_B = torch.nn.Linear(3, 12, bias=False)

    def forward(self, x):
        return x + self.lora_B(self.lora_A(x))


def test_without_a_basis_of_one_side_ekfac_is_k_fac_in_eigenbases():
    """Routing leaves the long sides of LoRA's factors without one; second moments would need both."""

    def train(rule, **options):
        torch.manual_seed(0)
        model = Adapter()
        opt = steepest.for_model(
            model, rule, lr=0.1, damping_form="relative", precondition_frequency=2, settle=0, **options
        )
        for _ in range(6):
            opt.zero_grad()
            model(torch.randn(8, 12)).square().mean().backward()
            opt.step()
        return [(W.detach(), opt.state[W]) for W in model.parameters()]

    for (W, state), (V, other), side in zip(train("ekfac"), train("kfac", form="eigen"), "BA", strict=True):
        assert {name for name in state if name.startswith("Q_")} == {f"Q_{side}"}
        assert torch.equal(W, V)
        assert torch.equal(state["S"], other["S"])
        assert state["S"].std() > 0
