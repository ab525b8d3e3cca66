"""Which parameters K-FAC takes, as which matrices, and why not the others; its names and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steepest
from steepest.rules.aliases import resolve


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.wide = nn.Linear(4, 70)
        self.tied = nn.Linear(4, 9, bias=False)
        self.tied.weight = self.table.weight
        self.head = nn.Linear(6, 2)


def test_layers_go_with_their_biases_and_everything_else_says_why() -> None:
    routing = steepest.route(Model(), "kfac")
    found = {row.name: (row.rule, row.layout, row.why) for row in routing}
    assert found["conv.weight"] == ("kfac", "2 groups of 3×(2·3)", "Conv1d, with its bias")
    assert found["head.weight"] == ("kfac", "2×7", "Linear, with its bias")
    assert found["head.bias"] == ("kfac", "column of 2", "last column of head.weight")
    assert found["norm.weight"][::2] == ("adamw", "norm")
    assert found["table.weight"][0] == "adamw"
    assert found["attention.out_proj.weight"][0] == "adamw"
    assert "doesn't call this module" in found["attention.out_proj.weight"][2]
    assert routing.warnings == ()
    assert "Linear, with its bias" in repr(routing)


def test_longer_sides_go_elsewhere_and_an_override_brings_them_back() -> None:
    model = nn.Sequential(nn.Linear(4, 70), nn.Linear(70, 3))
    with pytest.warns(UserWarning, match="no parameter goes to kfac"):
        optimizer = steepest.KFAC(model, max_precond_dim=16)
    assert [group["rule"] for group in optimizer.param_groups] == ["adamw"]
    optimizer = steepest.KFAC(model, max_precond_dim=16, overrides={"0.weight": {"max_precond_dim": 80}})
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    assert optimizer.state[model[0].weight]["B"].shape == (70, 70)


def test_overrides_name_rules_and_options() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    optimizer = steepest.for_model(
        model, "kfac", overrides={"0.weight": "soap", "1.*": {"damping": 0.5}, "2.bias": "adamw"}, lr=0.3
    )
    rules = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    found = {name: group["rule"] for name, group in rules.items()}
    assert {name for name, rule in found.items() if rule == "kfac"} == {"1.weight", "1.bias", "2.weight"}
    assert (found["0.weight"], found["0.bias"], found["2.bias"]) == ("soap", "adamw", "adamw")
    assert (rules["1.bias"]["damping"], rules["2.weight"]["damping"], rules["2.weight"]["bias"]) == (0.5, 0.01, False)
    assert (rules["0.weight"]["lr"], rules["0.bias"]["lr"]) == (0.3, 1e-3)
    with pytest.raises(ValueError, match=r"0.weight: kfac by override: LayerNorm has no matrix"):
        steepest.for_model(nn.Sequential(nn.LayerNorm((2, 3))), "kfac", overrides={"0.weight": "kfac"})


@pytest.mark.parametrize(("name", "kind"), [("kfac", steepest.KFAC), ("EK-FAC", steepest.EKFAC)])
def test_for_model_makes_the_same_as_the_class(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = Model()
    ours = steepest.for_model(model, name, weight_decay=0.1, elementwise={"lr": 1e-2, "betas": (0.8, 0.9)})
    theirs = kind(model, weight_decay=0.1, elementwise={"lr": 1e-2, "betas": (0.8, 0.9)})
    assert type(ours) is kind
    assert repr(ours) == repr(theirs)
    assert [g["weight_decay"] for g in ours.param_groups if "conv.bias" in g["param_names"]] == [0.0]


@pytest.mark.parametrize("kind", [steepest.KFAC, steepest.EKFAC])
@pytest.mark.parametrize(
    ("alias", "option", "value", "other"),
    [
        ("factor_update_steps", "statistics_frequency", 3, 5),
        ("T1", "statistics_frequency", 3, 5),
        ("inv_update_steps", "precondition_frequency", 7, 20),
        ("T2", "precondition_frequency", 7, 20),
        ("factor_decay", "factor_beta", 0.9, 0.95),
    ],
)
def test_names_of_other_libraries_count_and_may_not_contradict(
    kind: Any, alias: str, option: str, value: Any, other: Any
) -> None:
    model = nn.Linear(3, 2)
    assert kind(model, **{alias: value}).param_groups[0][option] == value
    assert resolve({"rule": "kfac", alias: value}) == {"rule": "kfac", option: value}
    with pytest.raises(ValueError, match=rf"{alias}={value} contradicts {option}={other}"):
        kind(model, **{alias: value, option: other})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampin": 1.0}, r"kfac has no such option \(did you mean 'damping'\?\)"),
        ({"damping": -1.0}, r"damping=-1.0"),
        ({"form": "inverses"}, r"form='inverses'"),
        ({"fisher": "true"}, r"fisher='true'"),
        ({"sharing": "none"}, r"sharing='none'"),
        ({"loss_terms": "tokens"}, r"loss_terms='tokens'"),
        ({"statistics_frequency": 0}, r"statistics_frequency=0"),
        ({"split": (1, 1)}, r"split=\(1, 1\): routing chooses views"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steepest.KFAC(nn.Linear(3, 2), **options)


def test_a_model_is_needed() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="must be a module"):
        steepest.KFAC(list(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameter 0 under rule='kfac'.*steepest.KFAC\(model\)"):
        steepest.Optimizer(model.parameters(), "kfac", lr=1.0)
    with pytest.raises(ValueError, match="thaw those to be trained"):
        steepest.KFAC(model.requires_grad_(False))
