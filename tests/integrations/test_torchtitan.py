"""torchtitan's container of optimizers, installed, or a stand-in by its documentation.

The stand-in has what torchtitan's documentation says of `OptimizersContainer` of version 0.3: a nested ``Config`` with
a ``build``, and the calls of one optimizer for several.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain import OPTIONS, assert_same, batches, beside, examples, falling, model, optimizer_of, train
from torch import nn

import steepest


class StandIn(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list = field(default_factory=list)
        implementation: str = "fused"

    def __init_subclass__(cls):
        cls.Config.build = lambda config, **kwargs: cls(config, **kwargs)

    def __iter__(self):
        return iter(self.optimizers)

    def __len__(self):
        return len(self.optimizers)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@pytest.fixture(scope="module")
def container():
    with beside("torchtitan", "torchtitan.components.optimizer", OptimizersContainer=StandIn) as module:
        yield module.SteepestOptimizers


def parts_of(net):
    """Return two stages of a pipeline, in which torchtitan leaves None for what others have."""
    stages = []
    for numbers, absent in (("0", ("head",)), ("1", ("embed",))):
        stage = copy.copy(net)
        stage._modules = net._modules | dict.fromkeys(absent)
        stage._modules["layers"] = nn.ModuleDict({number: net.layers[int(number)] for number in numbers})
        stages.append(stage)
    return stages


def built(container, parts, name="soap", **settings):
    elementwise, options = OPTIONS["elementwise"], {"weight_decay": OPTIONS["weight_decay"]}
    given = {"lr": OPTIONS["lr"], "elementwise": elementwise, "options": options} | settings
    return container.Config(name=name, **given).build(model_parts=parts)


def run(net, optimizers, schedulers, data, clip=None):
    for batch in data:
        net(**batch)["loss"].backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizers.step()
        for scheduler in schedulers:
            scheduler.step()
        optimizers.zero_grad()


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_two_stages_train_as_a_plain_loop_trains_the_whole(container, name):
    net = model()
    optimizers = built(container, parts_of(net), name)
    run(net, optimizers, [falling(each) for each in optimizers], batches(examples())[:6], clip=0.1)
    other = model()
    optimizer = optimizer_of(other, name)
    assert_same(net, train(other, optimizer, falling(optimizer), clip=0.1))


def test_routes_of_stages_are_those_of_the_whole(container):
    net = model()
    optimizers = built(container, parts_of(net))
    rules = {name: group["rule"] for each in optimizers for group in each.param_groups for name in group["param_names"]}
    assert rules == {row.name: row.rule for row in steepest.route(net, "soap")}
    assert {group["lr"] for each in optimizers for group in each.param_groups} == {3e-3, 1e-3}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("parts", [parts_of, lambda net: [net]])
def test_resumed_training_goes_on_bit_for_bit_also_in_other_stages(container, tmp_path, parts):
    data = batches(examples())[:6]
    whole, resumed = model(), model(seed=5)
    first = built(container, parts_of(whole))
    run(whole, first, [], data[:3])
    dcp.save({"model": whole.state_dict(), "optimizer": first}, checkpoint_id=tmp_path, no_dist=True)
    second = built(container, parts(resumed), lr=1.0)
    dcp.load({"model": resumed.state_dict(), "optimizer": second}, checkpoint_id=tmp_path, no_dist=True)
    run(whole, first, [], data[3:])
    run(resumed, second, [], data[3:])
    assert_same(whole, resumed)


def test_a_saved_state_has_a_key_for_each_value(container):
    saved = built(container, parts_of(model())).state_dict()
    assert saved["param_groups.layers.1.1.weight.lr"] == 3e-3
    assert saved["state.layers.0.1.weight.L"].shape == (16, 16)
    assert not any(isinstance(value, dict) for value in saved.values())


def test_hooks_around_a_step_of_all_parts_are_called(container):
    net, called = model(), []
    optimizers = built(container, parts_of(net))
    optimizers.register_step_pre_hook(lambda *_: called.append("before"))  # as torchtitan does for experts' biases
    run(net, optimizers, [], batches(examples())[:2])
    assert called == ["before", "before"]


def test_overrides_mean_the_stage_that_has_the_parameter(container):
    first, last = built(container, parts_of(model()), overrides={"layers.1.1.weight": {"lr": 1e-4}})
    assert {group["lr"] for group in first.param_groups} == {3e-3, 1e-3}
    assert {group["lr"] for group in last.param_groups} == {1e-4, 1e-3}
    with pytest.raises(ValueError, match=r"override 'layres.1.\*' matches no parameter"):
        built(container, [model()], overrides={"layres.1.*": "adamw"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"implementation": "foreach"}, "implementation='foreach': means torchtitan's own optimizers; give name"),
        ({"param_groups": [1]}, r"param_groups=\[1\]: means torchtitan's own"),
        ({"options": {"weight_decya": 0.1}}, "weight_decya=0.1: soap has no such option .did you mean 'weight_decay'"),
        ({"name": "adafactor"}, "name='adafactor': no such rule; there are soap, kl-soap, .* and adamw, and recipes"),
        ({"lr": "much"}, "lr='much': must be a finite number >= 0"),
    ],
)
def test_what_means_nothing_is_refused(container, settings, said):
    with pytest.raises(ValueError, match=said):
        built(container, [model()], **settings)


def test_numbers_in_strings_are_read(container):
    (optimizer,) = built(container, [model()], lr="2e-3", elementwise={}, options={"betas": "(0.8, 0.9)"})
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(2e-3, (0.8, 0.9))}
