from __future__ import annotations

import pytest
import torch
from torch import nn

from steepest.lab.shared.contenders import grid, parse_contenders, parse_sweep, preset
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.presets import BASELINE, PRESETS, QUICK


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def test_options_replace_the_presets_and_name_the_contender() -> None:
    (soap,) = parse_contenders("soap(precondition_frequency=5, lr=1e-2, warmup=0.1, betas=(.8, .9))")
    assert soap.label == "soap(precondition_frequency=5, lr=0.01, warmup=0.1, betas=(0.8, 0.9))"
    assert soap.lr == 0.01
    assert soap.warmup == 0.1
    assert soap.options["betas"] == (0.8, 0.9)
    assert soap.options["weight_decay"] == PRESETS["soap"].options["weight_decay"]


def test_elementwise_options_are_merged() -> None:
    (soap,) = parse_contenders("soap(elementwise={'lr': 1e-3})")
    assert soap.settings()["elementwise"] == {**PRESETS["soap"].elementwise, "lr": 1e-3}


def test_an_elementwise_contender_steps_everything_with_its_own_options(model) -> None:
    (adamw,) = parse_contenders("adamw(lr=0.125, betas=(0.5, 0.6))")
    assert {(group["lr"], group["betas"]) for group in adamw.optimizer(model).param_groups} == {(0.125, (0.5, 0.6))}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no optimizer"),
        ("sopa", "did you mean 'soap'"),
        ("xyzzy", "there are adamw"),
        ("soap(lr=", "options are names and plain values"),
        ("soap(1e-2)", "options are names and plain values"),
        ("soap(**{'lr': 1})", "options are names and plain values"),
        ("soap(lr=__import__('os').getpid())", "options are names and plain values"),
        ("soap(lr=1e-2) + 1", "options are names and plain values"),
        ("soap(elementwise=3)", "options are names and plain values"),
        ("soap, soap", "named twice"),
    ],
)
def test_what_cannot_be_read_gets_one_clear_line(text, complaint) -> None:
    with pytest.raises(BadInput) as caught:
        parse_contenders(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option", ["nonsense=1", "lr=-1", "lr='high'", "warmup=2", "warmup='long'", "elementwise={'nonsense': 1}"]
)
def test_options_that_the_rule_refuses_are_named_before_the_race(model, option) -> None:
    (contender,) = parse_contenders(f"soap({option})")
    with pytest.raises(BadInput) as caught:
        contender.check(model)
    assert option.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["lr", "=1", "lr=", "lr=1e", "lr=a"])
def test_a_sweep_that_cannot_be_read_gets_one_clear_line(text) -> None:
    with pytest.raises(BadInput, match="sweep"):
        parse_sweep(text)


def test_a_grid_has_every_combination() -> None:
    found = grid(preset("adamw"), {"lr": [0.1, 0.2], "warmup": [0.0, 0.5]})
    assert [(c.lr, c.warmup) for c in found] == [(0.1, 0.0), (0.1, 0.5), (0.2, 0.0), (0.2, 0.5)]
    assert {c.label for c in found} == {"adamw"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name, model) -> None:
    optimizer = preset(name).optimizer(model)
    start = model(torch.arange(5)).square().mean()
    start.backward()
    optimizer.step()
    assert model(torch.arange(5)).square().mean() < start


def test_every_preset_gets_the_same_number_of_trials() -> None:
    assert len({len(p.rates) for p in PRESETS.values()}) == 1
    for name, p in PRESETS.items():
        assert min(p.rates) < p.options["lr"] < max(p.rates), f"{name}'s rate should lie inside its grid"


def test_the_quick_race_has_the_baseline() -> None:
    assert BASELINE in QUICK
    assert set(QUICK) <= set(PRESETS)


def test_a_rate_that_was_named_is_not_swept() -> None:
    named, free = parse_contenders("soap(lr=1e-2), soap")
    assert named.rates == (1e-2,)
    assert len(free.rates) > 1


def test_a_recipe_is_a_contender(model) -> None:
    keller, moonlight, lion = parse_contenders("muon/keller, muon/moonlight(momentum=0.9), lion/paper")
    assert (keller.label, keller.rule, keller.lr) == ("muon/keller", "muon", 0.02)
    assert keller.rates == (0.01, 0.02, 0.04, 0.08)
    assert keller.elementwise["lr"] == 3e-4
    assert "kellerjordan" in keller.provenance
    assert (moonlight.options["momentum"], moonlight.lr) == (0.9, PRESETS["muon"].options["lr"])
    assert "names no learning rate" in moonlight.provenance
    for contender in (keller, moonlight, lion):
        contender.check(model)


def test_an_unknown_recipe_gets_one_clear_line() -> None:
    with pytest.raises(BadInput, match=r"no such recipe \(did you mean 'muon/keller'\?\); there are muon/keller, "):
        parse_contenders("muon/kelle")
