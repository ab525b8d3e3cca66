"""`steepest.create` and everything else that takes an optimizer's name: spellings, aliases, papers, near misses."""

import pytest
import torch
from torch import nn

import steepest
from steepest.engine.optimizer import Optimizer
from steepest.lab.shared.contenders import preset
from steepest.optimizers import ALIASES, BY_CLOSURE, NAMES, canonical, group_options
from steepest.optimizers.torch_optim import PAPERS, TORCH
from steepest.rules import RULES


def weight():
    return nn.Parameter(torch.eye(4))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("SOAP", "soap"),
        ("kl_soap", "kl-soap"),
        ("KL-SOAP", "kl-soap"),
        ("klsoap", "kl-soap"),
        ("soap-kl", "kl-soap"),
        ("Soap_KL", "kl-soap"),
        ("KLShampoo", "kl-shampoo"),
        ("shampoo kl", "kl-shampoo"),
        ("ReKLS", "rekls"),
        ("re-kls", "rekls"),
        ("Nor-Muon", "normuon"),
        ("dion_2", "dion2"),
        ("inverse-root", "inverse_root"),
        ("InverseRootSOAP", "inverse-root-soap"),
        ("adam_w", "adamw"),
        ("RMS-prop", "rmsprop"),
        ("sparse_adam", "sparseadam"),
        ("torch.Adam-W", "torch.adamw"),
        ("L-BFGS", "lbfgs"),
        ("torch.L-BFGS", "torch.lbfgs"),
    ],
)
def test_spellings_don_t_matter(spelling, name):
    assert canonical(spelling) == name
    if name in NAMES:
        assert group_options(spelling, {"lr": 0.1}) == group_options(name, {"lr": 0.1})


@pytest.mark.parametrize("name", sorted(TORCH.keys() - NAMES.keys() - BY_CLOSURE.keys() - {"sparseadam"}))
def test_every_optimizer_of_torch_is_there_by_name(name):
    spelling = TORCH[name].__name__
    assert type(steepest.create(spelling, [weight()], lr=0.1)) is TORCH[name]
    assert type(steepest.create(f"torch.{name}", [weight()], lr=0.1)) is TORCH[name]


@pytest.mark.parametrize(("name", "cls"), [("muon", "Muon"), ("lbfgs", "LBFGS")])
def test_torchs_is_told_from_ours(name, cls):
    assert type(steepest.create(name, [weight()])) is getattr(steepest, cls)
    assert type(steepest.create(f"torch.{name}", [weight()])) is getattr(torch.optim, cls)


@pytest.mark.parametrize("name", BY_CLOSURE)
def test_what_has_no_rule_is_made_of_all_parameters_and_not_routed(name):
    model = nn.Linear(3, 2)
    made = steepest.create(name, model.parameters())
    assert [p.shape for p in made.param_groups[0]["params"]] == [(2, 3), (2,)]
    for build in (steepest.route, steepest.for_model):
        with pytest.raises(
            ValueError, match=rf"name='{name}': .*one vector.*steepest.create\('{name}', model.parameters"
        ):
            build(model, name)
    with pytest.raises(ValueError, match="one vector"):
        steepest.for_model(model, "soap", lr=0.1, overrides={"weight": name})


def test_what_needs_the_model_is_not_made_of_parameters():
    with pytest.raises(ValueError, match=r"name='Gauss_Newton': .*use steepest.GaussNewton\(model\)"):
        steepest.create("Gauss_Newton", [weight()])


def test_no_two_names_are_the_same_but_for_their_spelling():
    for name in [*NAMES, *BY_CLOSURE, *TORCH]:
        assert canonical(name) == name
    for rule in RULES:
        assert canonical(rule) == rule or NAMES[canonical(rule)].rule == rule
    assert BY_CLOSURE.keys().isdisjoint({*NAMES, *RULES})
    assert ALIASES.keys().isdisjoint({*NAMES, *BY_CLOSURE, *TORCH, *RULES})
    assert set(ALIASES.values()) <= NAMES.keys()


def test_every_name_has_a_paper():
    assert PAPERS.keys() == TORCH.keys()
    assert all(PAPERS.values())
    assert all(entry.paper for entry in [*NAMES.values(), *BY_CLOSURE.values()])
    assert all(rule.paper for rule in RULES.values())


def test_kl_soap_is_soap_with_another_covariance():
    byname, spelled_out = (
        steepest.create("kl-soap", [weight()], lr=0.1),
        steepest.SOAP([weight()], 0.1, use_kl_shampoo=True),
    )
    for optimizer in (byname, spelled_out):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([[1.0, 2], [3, 5]]).kron(torch.eye(2))
        optimizer.step()
    assert type(byname) is steepest.SOAP
    assert byname.param_groups[0] | {"params": []} == spelled_out.param_groups[0] | {"params": []}
    assert torch.equal(*(optimizer.param_groups[0]["params"][0] for optimizer in (byname, spelled_out)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert steepest.for_model(model, "KL_SOAP", lr=0.1).param_groups[0]["rule"] == "kl_soap"
    assert steepest.for_model(model, "soap", lr=0.1, use_kl_shampoo=True).param_groups[0]["rule"] == "kl_soap"


def test_what_a_name_fixes_cannot_be_given_otherwise():
    with pytest.raises(TypeError, match="use_kl_shampoo"):
        steepest.create("kl-soap", [weight()], use_kl_shampoo=False)
    with pytest.raises(TypeError, match="solver"):
        steepest.create("rekls", [weight()], solver="qr")


def test_a_name_that_needs_the_model_says_so():
    for name in ("kfac", "ekfac"):
        with pytest.raises(TypeError, match=rf"use steepest.{name.upper()}\(model\)"):
            steepest.create(name, [weight()], lr=0.1)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("kfac", "ekfac")])
def test_a_class_and_a_group_of_its_name_have_the_same_options(name):
    made = steepest.create(name, [weight()], lr=0.1)
    group = Optimizer([weight()], **group_options(name, {"lr": 0.1}))
    assert made.param_groups[0] | {"params": []} == group.param_groups[0] | {"params": []}


def test_the_form_that_was_an_argument_of_soap_is_a_class():
    with pytest.raises(ValueError, match=r"form: .*steepest.InverseRootSOAP"):
        steepest.create("soap", [weight()], form="inverse_root")
    group = steepest.create("inverse-root-soap", [weight()], graft="adam").param_groups[0]
    assert (group["rule"], group["root"], group["graft"], group["shampoo_beta"]) == ("inverse_root", 4, "adam", 0.95)


def test_another_name_of_an_option_counts_and_may_not_contradict_it():
    group = steepest.SOAP([weight()], preconditioner_decay=0.7, use_eigh=True).param_groups[0]
    assert (group["shampoo_beta"], group["solver"]) == (0.7, "eigh")
    with pytest.raises(ValueError, match=r"preconditioner_decay.*shampoo_beta"):
        steepest.SOAP([weight()], shampoo_beta=0.8, preconditioner_decay=0.7)
    with pytest.raises(ValueError, match=r"use_eigh.*solver"):
        steepest.SOAP([weight()], use_eigh=True, solver="qr")


def test_a_race_takes_any_spelling():
    assert preset("KL_SOAP") == preset("soap-kl") == preset("kl-soap")
    assert preset("AdamW") == preset("adamw")


@pytest.mark.parametrize(
    ("name", "suggested"), [("saop", "soap"), ("mu0n", "muon"), ("adamww", "adamw"), ("kl-sopa", "kl-soap")]
)
def test_an_unknown_name_suggests_the_nearest(name, suggested):
    with pytest.raises(ValueError, match=rf"name='{name}': no such optimizer \(did you mean '{suggested}'\?\)"):
        steepest.create(name, [weight()])


def test_a_name_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ValueError, match=r"^name='xyzzy': no such optimizer$"):
        steepest.create("xyzzy", [weight()])
    with pytest.raises(ValueError, match=r"^name='torch.saop': no such optimizer"):
        steepest.create("torch.saop", [weight()])
