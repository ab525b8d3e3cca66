"""Adapters of peft, installed: LoRA's factors are matrices, by names, by shapes, and in a Trainer."""

import pytest
import torch
from plain import host, model

import steepest
from steepest.integrations import ByShape, TrainerFactory

peft = host("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted():
    torch.manual_seed(0)
    return peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=["0.1", "1.1"]))


def trainable(net):
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


def step(net, optimizer):
    tokens = torch.arange(16).reshape(2, 8)
    for _ in range(6):
        net(tokens, labels=tokens)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.mark.parametrize("by", ["names", "shapes", "factory"])
def test_factors_are_matrices_without_a_basis_of_their_long_sides(by):
    net, other = adapted(), adapted()
    options = {"lr": 3e-3, "weight_decay": 0.1}
    if by == "factory":
        optimizer = TrainerFactory()(net, name="soap", **options)
    else:
        optimizer = ByShape(trainable(net) if by == "names" else [p for _, p in trainable(net)], **options)
    step(net, optimizer)
    step(other, steepest.for_model(other, "soap", **options))
    assert {group["rule"] for group in optimizer.param_groups} == {"soap"}
    assert {tuple(optimizer.state[p]["exp_avg"].shape) for _, p in trainable(net)} == {(2, 16), (16, 2)}
    assert all(
        entries.keys().isdisjoint({"Q_R"}) or entries["Q_R"].shape == (2, 2) for entries in optimizer.state.values()
    )
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(trainable(net), trainable(other), strict=True))


def test_routes_are_those_of_route_and_a_resume_goes_on_bit_for_bit():
    whole, resumed = adapted(), adapted()
    first, second = (TrainerFactory()(net, name="muon", lr=3e-3) for net in (whole, resumed))
    rules = {name: group["rule"] for group in first.param_groups for name in group["param_names"]}
    assert rules == {row.name: row.rule for row in steepest.route(whole, "muon")}
    assert set(rules) == {name for name, _ in trainable(whole)}
    step(whole, first)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(first.state_dict())
    step(whole, first)
    step(resumed, second)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(trainable(whole), trainable(resumed), strict=True))
