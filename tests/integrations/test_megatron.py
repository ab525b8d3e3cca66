"""Megatron's use of an optimizer of ``emerging_optimizers.registry``, installed, or a stand-in by its documentation.

Megatron itself is not run: `create` and `Main` do what its documentation says of its core, version 0.19. It matches the
arguments of a constructor with its configuration, calls ``_init_group`` before it loads a checkpoint, and steps float32
copies of weights that are narrower.
"""

import copy
import inspect
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from plain import batches, beside, examples, model
from torch import nn

import steepest

CLASSES = {}
NAME = "steepest_soap"
CONFIG = {"lr": 3e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "steepest_soap_shampoo_beta": 0.8}


def register_optimizer(name):
    return lambda cls: CLASSES.setdefault(name, cls)


@pytest.fixture(scope="module")
def names():
    members = {"register_optimizer": register_optimizer, "get_optimizer_cls": CLASSES.__getitem__}
    with beside("megatron", "emerging_optimizers.registry", **members) as module:
        yield module


def create(names, groups, name=NAME, **config):
    """Make an optimizer as Megatron does."""
    config = SimpleNamespace(**CONFIG | config)
    cls = names.registry.get_optimizer_cls(name)
    kwargs = {}
    for argument in inspect.signature(cls.__init__).parameters.keys() - {"self", "params"}:
        for attribute in (f"{name}_{argument}", argument):
            if hasattr(config, attribute):
                kwargs[argument] = getattr(config, attribute)
                break
    return cls(groups, **kwargs | {"betas": (config.adam_beta1, config.adam_beta2)})


def matrices_of(net):
    """Return groups of what Megatron gives to such an optimizer: matrices that are no embedding and no head."""
    chosen = [p for name, p in net.named_parameters() if p.ndim == 2 and not name.startswith(("embed", "head"))]
    return [{"params": chosen, "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "default_config": True}]


class Main:
    """An optimizer of float32 copies of bfloat16 weights, which take their places once it has been made."""

    def __init__(self, optimizer):
        self.optimizer, self.pairs = optimizer, []
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                main = nn.Parameter(p.detach().float())
                group["params"][i] = main
                optimizer.state[main] = optimizer.state.pop(p)
                self.pairs.append((p, main))

    def step(self):
        for p, main in self.pairs:
            main.grad = p.grad.float()
        self.optimizer.step()
        for p, main in self.pairs:
            p.data.copy_(main)


def run(net, optimizer, rates=None, clip=None, data=None, groups=None):
    for number, batch in enumerate(data or batches(examples())[:6]):
        net(**batch)["loss"].backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        for group in groups or ():
            group["lr"] = rates[number] * group["lr_mult"]  # as Megatron's scheduler writes it
        optimizer.step()
        net.zero_grad()
    return net


def plain(net, lr=3e-3):
    return steepest.SOAP(matrices_of(net)[0]["params"], lr=lr, betas=(0.8, 0.9), weight_decay=0.1, shampoo_beta=0.8)


def assert_trained(net, other):
    """Assert that matrices, which alone are trained here, are the same."""
    mine, theirs = net.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(
        mine["layers.0.1.weight"], model().state_dict()["layers.0.1.weight"].to(mine["embed.weight"])
    )


def test_it_trains_as_a_plain_loop_with_a_schedule_and_clipping(names):
    net, other = model(), model()
    optimizer, alone = create(names, matrices_of(net)), plain(other)
    for group in alone.param_groups:
        group["lr_mult"] = 1.0
    rates = [3e-3 / (1 + number) for number in range(6)]
    run(net, optimizer, rates, clip=0.1, groups=optimizer.param_groups)
    run(other, alone, rates, clip=0.1, groups=alone.param_groups)
    assert_trained(net, other)


def test_float32_copies_of_bfloat16_weights(names):
    net, other = model().bfloat16(), model().bfloat16()
    run(net, Main(create(names, matrices_of(net))))
    run(other, Main(plain(other)))
    assert_trained(net, other)


def test_resumed_training_goes_on_bit_for_bit(names):
    data = batches(examples())[:6]
    whole, first = (net := model()), create(names, matrices_of(net))
    run(whole, first, data=data[:3])
    resumed, second = (net := model(seed=5)), create(names, matrices_of(net))
    for group in second.param_groups:
        second._init_group(group, skip_non_grad_params=False)
    resumed.load_state_dict(whole.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(whole, first, data=data[3:])
    run(resumed, second, data=data[3:])
    assert_trained(whole, resumed)


def test_matrices_are_those_of_route(names):
    net = model()
    (group,) = create(names, matrices_of(net)).param_groups
    routed = [row.param for row in steepest.route(net, "soap") if row.rule == "soap"]
    assert group["rule"] == "soap"
    assert [id(p) for p in group["params"]] == [id(p) for p in routed]
    assert (group["betas"], group["shampoo_beta"], group["wd_mult"]) == ((0.8, 0.9), 0.8, 1.0)


def test_every_name_makes_its_optimizer_which_can_be_pickled(names):
    for ours, theirs in names.REGISTERED.items():
        optimizer = create(names, matrices_of(model()), theirs)
        assert {group["rule"] for group in optimizer.param_groups} == {steepest.optimizers.NAMES[ours].rule}
        assert "steepest" in theirs  # Megatron has a muon and a soap
        assert repr(pickle.loads(pickle.dumps(optimizer))) == repr(optimizer)
    assert names.REGISTERED["kl-soap"] == "steepest_kl_soap"


def test_numbers_in_strings_are_read_and_others_refused(names):
    (group,) = create(names, matrices_of(model()), steepest_soap_precondition_frequency="5").param_groups
    assert group["precondition_frequency"] == 5
    with pytest.raises(ValueError, match=r"shampoo_beta='much': must be a number"):
        create(names, matrices_of(model()), steepest_soap_shampoo_beta="much")
    with pytest.raises(ValueError, match="lr=None"):
        create(names, matrices_of(model()), lr=None)
    with pytest.raises(ValueError, match=r"shampoo_bet=0.8: soap has no such option .did you mean 'shampoo_beta'"):
        names.registry.get_optimizer_cls(NAME)(matrices_of(model()), lr=0.1, shampoo_bet=0.8)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "emerging_optimizers", None)
    monkeypatch.delitem(sys.modules, "steepest.integrations.megatron", raising=False)
    with pytest.raises(ImportError, match="install the package emerging-optimizers"):
        import steepest.integrations.megatron  # noqa: F401


@pytest.mark.parametrize(("ranks", "initialized"), [(2, True), (1, True), (2, False)])
def test_parts_of_matrices_are_refused_where_there_are_several(names, monkeypatch, ranks, initialized):
    """Megatron marks its parallel layers' weights on one rank, too; they are whole there."""
    state = SimpleNamespace(
        model_parallel_is_initialized=lambda: initialized, get_tensor_model_parallel_world_size=lambda: ranks
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    groups = matrices_of(model())
    groups[0]["params"][0].tensor_model_parallel = True
    if ranks == 2 and initialized:
        with pytest.raises(
            ValueError, match=r"1 parameters, the first of shape \(.*\), are this rank's parts of matrices"
        ):
            create(names, groups)
    else:
        create(names, groups)
