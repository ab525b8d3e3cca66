"""LLaMA-Factory's plugins for optimizers, installed, or a stand-in by its documentation.

The stand-in has what the documentation says of `OptimizerPlugin` of version 0.9.5: a name for each, ``register``, and a
call with the model and the configuration, a dict that has ``name``.
"""

import logging
from typing import ClassVar

import pytest
import torch
from plain import (
    OPTIONS,
    assert_same,
    assert_same_state,
    beside,
    falling,
    model,
    optimizer_of,
    train,
)

import steepest


class StandIn:
    known: ClassVar = {"lion": {"__call__": "another's"}}

    def __init__(self, name):
        self.name = name

    def register(self, method="__call__"):
        return lambda function: self.known.setdefault(self.name, {}).__setitem__(method, function) or function

    def __getitem__(self, method):
        if method not in self.known.get(self.name, ()):
            raise ValueError(f"Method {method} of plugin {self.name} is not registered.")
        return self.known[self.name][method]

    def __call__(self, *args):
        return self["__call__"](*args)


@pytest.fixture(scope="module")
def names():
    hook = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    with beside("llamafactory", hook, OptimizerPlugin=StandIn) as module:
        yield module


def created(names, net, ours="soap", **config):
    config = {"name": names.REGISTERED[ours], **OPTIONS, **config}
    return names.OptimizerPlugin(config["name"])(net, config)


@pytest.mark.parametrize("ours", ["soap", "muon", "kl-soap"])
def test_it_trains_as_a_plain_loop(names, ours):
    net, other = model(), model()
    optimizer, alone = created(names, net, ours), optimizer_of(other, ours)
    train(net, optimizer, falling(optimizer), clip=0.1, accumulation=2)
    assert_same(net, train(other, alone, falling(alone), clip=0.1, accumulation=2))


def test_resumed_training_goes_on_bit_for_bit(names, tmp_path):
    whole, resumed = model(), model(seed=5)
    first, second = created(names, whole), created(names, resumed, lr=1.0)
    train(whole, first)
    torch.save({"model": whole.state_dict(), "optimizer": first.state_dict()}, tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert_same(train(whole, first), train(resumed, second))
    assert_same_state(first, second)


def test_routes_are_logged_and_those_of_route(names, caplog):
    caplog.set_level(logging.INFO, "steepest.integrations")
    net = model()
    optimizer = created(names, net, lr="2e-3", stagger="True")
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rules == {row.name: row.rule for row in steepest.route(net, "soap")}
    assert caplog.messages == [f"LLaMA-Factory: soap\n{steepest.route(net, 'soap')!r}"]
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["stagger"]) == (2e-3, True)


def test_every_optimizer_is_there_and_names_of_others_stay_theirs(names):
    assert names.REGISTERED.keys() == steepest.optimizers.NAMES.keys()
    if names.OptimizerPlugin is StandIn:
        assert names.REGISTERED["lion"] == "steepest-lion"
        assert StandIn("lion")["__call__"] == "another's"
    assert names.REGISTERED["muon"] == "muon"
    assert names.register() == names.REGISTERED  # once more changes nothing


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lr": "much"}, "lr='much': must be a finite number >= 0"),
        ({"weight_decya": 0.1}, "weight_decya=0.1: soap has no such option .did you mean 'weight_decay'"),
        ({"elementwise": {"rule": "adafactor"}}, "name='adafactor': no such rule"),
    ],
)
def test_bad_settings_are_named(names, config, said):
    with pytest.raises(ValueError, match=said):
        created(names, model(), **config)
    with pytest.raises(TypeError, match="the learning rate is missing"):
        names.OptimizerPlugin("soap")(model(), {"name": "soap"})
