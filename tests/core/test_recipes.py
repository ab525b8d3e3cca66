"""Recipes: each builds, steps and has a source; what the caller says goes first."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import steepest
from steepest.recipes import RECIPES
from steepest.rules.aliases import resolve

LR = {"lr": 1e-3}


def needed(recipe):
    """A learning rate for recipes that have none."""
    return {} if "lr" in recipe.options else LR


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


def test_it_says_where_it_is_from(recipe):
    assert re.search(r"arXiv:\d{4}\.\d{5}|https://", recipe.source)
    assert re.fullmatch(r"20\d\d(-[01]\d)?", recipe.date)
    assert recipe.note.endswith(".")
    assert recipe.name.split("/")[0] == recipe.optimizer
    assert recipe.source in str(recipe)


def test_it_builds_by_name_and_moves_a_matrix(recipe):
    W = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    before = W.detach().clone()
    optimizer = steepest.create(recipe.name, [W], **needed(recipe))
    for seed in (1, 2):  # the first gradient may only seed a basis
        W.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert torch.isfinite(W).all()
    assert not torch.equal(W, before)


def test_it_trains_a_model(recipe):
    model = small_model()
    optimizer = steepest.for_model(model, recipe.name, **needed(recipe))
    x = torch.randn(16, 6)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]


def test_all_its_options_arrive(recipe):
    group = steepest.for_model(small_model(), recipe.name, **needed(recipe)).param_groups[0]
    options = resolve({"rule": recipe.optimizer, **recipe.options})
    assert {name: group[name] for name in options} == options


def test_what_is_no_matrix_gets_its_elementwise_options(recipe):
    if recipe.elementwise is None:
        return
    groups = steepest.for_model(small_model(), recipe.name, **needed(recipe)).param_groups
    rest = [group for group in groups if group["rule"] == "adamw"]
    assert rest
    for group in rest:
        assert {name: group[name] for name in recipe.elementwise} == dict(recipe.elementwise)


def test_what_the_caller_says_goes_first():
    optimizer = steepest.for_model(
        small_model(), "muon/keller", lr=0.5, momentum=0.8, elementwise={"lr": 0.25}, overrides={"2.*": "soap/paper"}
    )
    muon, soap, *rest = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["scale"]) == (0.5, 0.8, "original")
    assert (soap["rule"], soap["lr"], soap["precondition_frequency"]) == ("soap", 3e-3, 10)
    assert {(group["lr"], group["eps"]) for group in rest} == {(0.25, 1e-10)}
    created = steepest.create("soap/paper", small_model().parameters(), lr=0.1, preconditioner_decay=0.7, use_eigh=True)
    assert [created.defaults[name] for name in ("lr", "shampoo_beta", "solver")] == [0.1, 0.7, "eigh"]


def test_another_elementwise_rule_leaves_the_recipes_options_behind():
    groups = steepest.for_model(small_model(), "muon/keller", elementwise={"rule": "lion/paper"}).param_groups
    assert {(g["rule"], g["lr"], g["betas"]) for g in groups[1:]} == {("lion", 1e-4, (0.9, 0.99))}


def test_soap_as_in_the_paper_is_soap_with_these_arguments():
    """The settings under which tests/reference compares with the authors' numbers."""
    theirs = steepest.recipe("soap/paper").options
    assert (theirs["basis_timing"], theirs["correct_shampoo_beta_bias"]) == ("after", False)
    W = nn.Parameter(torch.ones(2, 3))
    optimizer = steepest.create("soap/paper", [W])
    guards = [optimizer.defaults[name] for name in ("momentum_floor", "noise_floor", "match_columns")]
    assert guards == [False, 0.0, False]
    W.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(W, torch.ones(2, 3) * (1 - 0.01 * 3e-3)) or torch.equal(W, torch.ones(2, 3))  # it only seeds


def test_without_a_rate_anywhere_one_is_asked_for():
    with pytest.raises(TypeError, match=r"for_model\(model, 'muon/moonlight', lr=...\): the learning rate is missing"):
        steepest.for_model(small_model(), "muon/moonlight")
    with pytest.raises(TypeError, match="learning rate is missing"):
        steepest.for_model(small_model(), "soap")


@pytest.mark.parametrize(
    "door", [steepest.recipe, lambda name: steepest.create(name, [nn.Parameter(torch.ones(2, 2))])]
)
def test_an_unknown_name_suggests_the_nearest(door):
    with pytest.raises(ValueError, match=r"name='soap/papre': no such recipe \(did you mean 'soap/paper'\?\)"):
        door("soap/papre")


def test_the_page_lists_every_recipe():
    page = (Path(__file__).parents[2] / "docs/which-optimizer.md").read_text()
    assert re.findall(r"^\| `([\w-]+/\w+)` \|", page, re.MULTILINE) == list(RECIPES)


def test_a_routing_takes_its_rule():
    assert steepest.route(small_model(), "shampoo/algoperf").rule == "shampoo"
