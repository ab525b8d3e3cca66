"""Entries of a group: other spellings of options, misspellings, entries that are no options, and its parameters."""

from __future__ import annotations

import inspect
from typing import Any

import fed
import pytest
from plain_groups import CLASSES, arguments, expect_same, parameters, snapshot

import steepest
from steepest import Optimizer
from steepest.engine.group import option_defaults, plain_options
from steepest.rules import RULES
from steepest.rules.aliases import ALIASES


@pytest.mark.parametrize(
    ("name", "options", "both"),
    [
        ("soap", {"use_eigh": True, "solver": "qr"}, "use_eigh=True contradicts solver='qr'"),
        ("soap", {"use_eigh": True, "solver": "auto"}, "use_eigh=True contradicts solver='auto'"),
        ("soap", {"use_eigh": False, "solver": "eigh"}, "use_eigh=False contradicts solver='eigh'"),
        ("rekls", {"use_eigh": False}, "use_eigh=False contradicts solver='eigh'"),
        ("rekls", {"use_kl_shampoo": False}, "use_kl_shampoo=False contradicts rule='kl_soap'"),
        ("soap", {"guards": False, "noise_floor": "auto"}, "guards=False contradicts noise_floor=0.01"),
        ("soap", {"guards": False, "momentum_floor": True}, "guards=False contradicts momentum_floor=True"),
        ("kl-soap", {"guards": False, "kl_floor": 1e-4}, "guards=False contradicts kl_floor=0.0001"),
        *[
            (
                name,
                {"preconditioner_decay": 0.9, "shampoo_beta": 0.95},
                "preconditioner_decay=0.9 contradicts shampoo_b",
            )
            for name in ("soap", "inverse-root-soap")
        ],
    ],
)
def test_two_spellings_that_contradict_each_other_are_refused_by_both_names(
    name: str, options: dict[str, Any], both: str
) -> None:
    with pytest.raises(ValueError, match=both):
        steepest.create(name, parameters(), **options)


@pytest.mark.parametrize("optimizer", CLASSES)
def test_arguments_that_stay_out_of_the_options_are_the_rules_defaults(optimizer: type[Optimizer]) -> None:
    group, defaults = optimizer(parameters()).param_groups[0], arguments(optimizer)
    for name in {"solver", "shampoo_beta"} & inspect.signature(optimizer).parameters.keys():
        assert group[name] == defaults[name]
    assert defaults.get("preconditioner_decay") in (None, group.get("shampoo_beta"))


def test_a_group_may_turn_an_alias_back() -> None:
    W, V = parameters((6, 4), (4, 4))
    optimizer = steepest.SOAP([{"params": [W]}, {"params": [V], "guards": True, "use_eigh": False}], guards=False)
    here, there = optimizer.param_groups
    assert (here["noise_floor"], here["momentum_floor"]) == (0, False)
    defaults = option_defaults("soap")
    for name in ("noise_floor", "momentum_floor", "solver"):
        assert there[name] == defaults[name]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_that_is_set_in_training_is_refused(rule: str, alias: str) -> None:
    optimizer = fed.optimizer(parameters(), rule, lr=0.1)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0][alias] = False
    with pytest.raises(ValueError, match=rf"{alias}=False: counts only where a group is made; \w+"):
        optimizer.step()
    expect_same(optimizer, before)


FOREIGN = [
    *("initial_lr", "lr_scale", "lr_mult", "max_lr", "min_lr", "base_momentum", "max_momentum", "swanlab", "name"),
    *("weight_decay_scale", "no_weight_decay", "layer_decay", "lr_decay", "group_name", "fused", "foreach", "wd_mult"),
]


@pytest.mark.parametrize("rule", RULES)
def test_entries_that_are_no_options_stay(rule: str) -> None:
    (W,) = parameters()
    optimizer = fed.optimizer([{"params": [W]} | dict.fromkeys(FOREIGN, 0.5)], rule, lr=0.1)
    optimizer.step()
    assert all(optimizer.param_groups[0][name] == 0.5 for name in FOREIGN)
    assert not plain_options(optimizer.param_groups[0]).keys() & {"params", *FOREIGN}


@pytest.mark.parametrize(
    ("rule", "entries", "message"),
    [
        ("soap", {"weight_dekay": 0.1}, "weight_dekay=0.1: soap has no such option .did you mean 'weight_decay'"),
        ("soap", {"beta": (0.9, 0.9)}, "beta=.*did you mean 'betas'"),
        ("soap", {"use_egh": True}, "did you mean 'use_eigh'"),
        ("muon", {"shampoo_beta": 0.9}, "shampoo_beta=0.9: muon has no such option"),
        ("muon", {"guards": False}, "guards=False: muon has no such option"),
        ("adamw", {"stagger": True}, "stagger=True: adamw has no such option"),
        ("lion", {"heads": 2}, "heads=2: lion has no such option"),
        ("soap", {"amsgrad": True}, "amsgrad=True: soap has no such option"),
        ("adamw", {"maximize": True}, "maximize=True: not supported"),
        ("soap", {"differentiable": True}, "differentiable=True: not supported"),
    ],
)
def test_an_entry_that_is_meant_as_an_option_is_refused(rule: str, entries: dict[str, Any], message: str) -> None:
    optimizer = Optimizer(parameters(), "soap", lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), "rule": rule, **entries})
    assert len(optimizer.param_groups) == 1


def test_a_misspelt_params_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'params'"):
        Optimizer([{"param": parameters()}], lr=0.1)


# Parameters.


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_is_given_once_and_in_order(rule: str) -> None:
    W, V = parameters((6, 4), (4, 4))
    for unordered in ({W, V}, frozenset([W])):
        with pytest.raises(TypeError, match="set"):
            fed.optimizer([{"params": unordered}], rule, lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 0 and parameter 2 are one parameter, of shape \[6, 4\]"):
        fed.optimizer([W, V, W], rule, lr=0.1)
    with pytest.raises(ValueError, match=r"embed and head are one parameter"):
        fed.optimizer([("embed", W), ("head", W)], rule, lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        fed.optimizer([{"params": [W]}, {"params": [V, W]}], rule, lr=0.1)
