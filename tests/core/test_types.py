"""A type checker refuses misspelled words and options in a user's program; signatures say what they have to."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import steepest
from steepest.engine.group import option_defaults
from steepest.optimizers import NAMES
from steepest.optimizers.shared import GroupOptions, SharedOptions
from steepest.optimizers.soap import SOAPOptions
from steepest.view import OPTIONS as VIEWS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
import steepest
from torch import nn

model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
p = list(model.parameters())
named = list(model.named_parameters())
groups = [{"params": p, "lr": 0.1}]

steepest.SOAP(p, lr=1e-3, solver="qqr")  # wrong
steepest.SOAP(p, lr=1e-3, weight_decay_method="decoupeld")  # wrong
steepest.SOAP(p, lr=1e-3, precondition_freqency=3)  # wrong
steepest.SOAP(p, lr=1e-3, form="inverse_root")  # wrong
steepest.Muon(p, scale="match_rms_adam")  # wrong
steepest.Muon(p, nonfinite="ignore")  # wrong
steepest.Shampoo(p, solver="first_order")  # wrong
steepest.Dion(p, orthonormalize="qrr")  # wrong
steepest.MOSO(p, inner="sgd")  # wrong
steepest.NorMuon(p, axis="row")  # wrong
steepest.InverseRootSOAP(p, graft="sgd")  # wrong
steepest.Lion(p, merge_dims=False)  # wrong

steepest.SOAP(p)
steepest.SOAP(named, lr=torch.tensor(1e-3), solver="eigh", guards=False, stagger=True, nonfinite="raise")
steepest.SOAP(groups, 1e-3, (0.9, 0.95), 0.95, noise_floor="auto", precondition_frequency=lambda step: 1 + step // 10)
steepest.SOAP(p, precondition_frequency=steepest.LinearSchedule(1, 10, 100), use_kl_shampoo=True, kl_floor=0.0)
steepest.REKLS(p, lr=1e-3, weight_decay_method="l2", block_size=64)
steepest.InverseRootSOAP(p, lr=1e-3, preconditioner_decay=0.9, graft="adam", cuda_graph=True)
steepest.MOSO(p, inner="rmsprop", qr_fp32_matmul_prec="medium", stochastic_rounding=True, rounding_seed=1)
steepest.Shampoo(p, graft="rmsprop", solver="eigh", exponent=-0.5, compile=True)
steepest.Shampoo(p, use_kl_shampoo=True, kl_floor=1e-3)
steepest.KLShampoo(p, kl_floor=1e-3, heads=1)
steepest.Muon(p, lr=0.02, ns="polar_express_5", ns_dtype="bfloat16", scale="original", split=(), transpose=False)
steepest.NorMuon(p, axis="columns", merge_dims=False)
steepest.AdaMuon(p, sign=False)
steepest.Dion(p, rank_fraction=0.5, orthonormalize="qr")
steepest.Dion2(p, fraction=0.5, ns="exact")
steepest.Lion(p, lr=1e-4, nonfinite="skip")
steepest.Optimizer(p, "soap", lr=1e-3)


def closure() -> float:
    return 1.0


optimizer = steepest.for_model(model, "soap", lr=1e-3, elementwise={"lr": 1e-4}, overrides={nn.Linear: {"lr": 1e-2}})
optimizer.step()
loss = optimizer.step(closure)
print(loss, steepest.route(model)["0.weight"].why, optimizer.param_groups[0]["lr"])
made: torch.optim.Optimizer = steepest.create("kl-soap", p, lr=1e-3)
made.step()
"""


def test_a_type_checker_refuses_what_is_misspelled_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "program.py")],
        cwd=ROOT,  # whose cache has torch and the library from `make types`, under the same configuration: it is strict
        env=os.environ | {"MYPYPATH": "src"},
        capture_output=True,
        text=True,
    )
    wrong = {number for number, line in enumerate(PROGRAM.splitlines(), start=1) if line.endswith("# wrong")}
    refused = {int(line) for line in re.findall(r"program\.py:(\d+): error", done.stdout)}
    assert refused == wrong, done.stdout + done.stderr
    assert f"Found {len(wrong)} errors in 1 file" in done.stdout


@pytest.mark.parametrize(
    "make",
    [
        lambda p, model, **options: steepest.SOAP(p, lr=1e-3, **options),
        lambda p, model, **options: steepest.create("soap", p, lr=1e-3, **options),
        lambda p, model, **options: steepest.for_model(model, "soap", lr=1e-3, **options),
    ],
    ids=["class", "create", "for_model"],
)
def test_a_misspelled_option_is_refused_with_the_nearest(make: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    message = r"precondition_freqency=3: soap has no such option \(did you mean 'precondition_frequency'\?\)"
    with pytest.raises(ValueError, match=message):
        make(model.parameters(), model, precondition_freqency=3)


# Signatures.

PUBLISHED = (
    "params lr betas shampoo_beta eps weight_decay weight_decay_method nesterov precondition_frequency "
    "adam_warmup_steps correct_bias fp32_matmul_prec use_eigh qr_fp32_matmul_prec use_adaptive_criteria "
    "adaptive_update_tolerance power_iter_steps max_update_rms use_kl_shampoo correct_shampoo_beta_bias"
)
CIRCULATING = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "precondition_frequency": 10,
    "max_precond_dim": 1024,
    "preconditioner_decay": 0.95,
    "merge_dims": True,
    "precondition_1d": False,
}
"""The arguments, and their defaults, of the inverse-root formula where it goes by SOAP's name."""


def arguments(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(class_of(name)).parameters)


def class_of(name: str) -> Any:
    """The class of a name; NAMES has functions where parameters alone are too little, and for KL-SOAP."""
    return {"kl-soap": steepest.SOAP, "kfac": steepest.KFAC, "ekfac": steepest.EKFAC}.get(name, NAMES[name].optimizer)


OF_A_MODEL = {"model", "fisher", "sharing", "loss_terms", "grad_scaler", "elementwise", "overrides"}
"""Arguments of K-FAC that are no options of parameter groups."""


def test_soap_has_the_published_arguments_first_and_no_more_than_can_be_read() -> None:
    names = list(arguments("soap"))
    assert names[:20] == PUBLISHED.split()
    assert len(names) <= 32
    assert list(arguments("rekls"))[:7] == PUBLISHED.split()[:7]


def test_the_inverse_root_formula_has_its_arguments_and_defaults_and_soap_has_the_arguments() -> None:
    ours = arguments("inverse-root-soap")
    assert {name: ours[name].default for name in CIRCULATING} == CIRCULATING
    assert CIRCULATING.keys() <= arguments("soap").keys()


SPELLINGS: dict[str, Any] = {"use_eigh": False, "use_kl_shampoo": False, "preconditioner_decay": None, "guards": True}
"""Arguments that are other names of options, with defaults that change none."""


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_rule_where_a_name_sets_no_other(name: str) -> None:
    entry = NAMES[name]
    known = option_defaults(entry.rule) | dict(entry.settings)
    for argument in arguments(name).values():
        if argument.name in {"params", "lr"} | OF_A_MODEL or argument.kind is argument.VAR_KEYWORD:
            continue
        if (name, argument.name) == ("inverse-root-soap", "preconditioner_decay"):
            assert argument.default == known["shampoo_beta"]
        elif argument.name in SPELLINGS:
            assert argument.default is SPELLINGS[argument.name]
        else:
            assert argument.default == known[argument.name], argument.name


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("kl-soap", "rekls", "kl-shampoo")])
def test_every_option_of_a_rule_is_an_argument_with_a_type(name: str) -> None:
    """REKLS and KLShampoo leave some to SOAP and Shampoo."""
    entry = NAMES[name]
    hints = get_type_hints(class_of(name).__init__)
    (options,) = hints.pop("options").__args__
    known = hints.keys() | get_type_hints(options).keys()
    if name == "inverse-root-soap":
        known |= {"shampoo_beta"}  # as preconditioner_decay
    if name in ("kfac", "ekfac"):
        known |= {"bias", *VIEWS}  # which routing chooses for each layer
    assert option_defaults(entry.rule).keys() - {"rule"} <= known


def test_shared_options_exist_and_are_documented() -> None:
    assert get_type_hints(GroupOptions).keys() <= option_defaults("lion").keys()
    assert get_type_hints(SharedOptions).keys() <= option_defaults("muon").keys()
    assert get_type_hints(SOAPOptions).keys() <= option_defaults("kl_soap").keys()
    text = f"{inspect.getdoc(SharedOptions)}\n{inspect.getdoc(SOAPOptions)}"
    for option in get_type_hints(SOAPOptions):
        assert re.search(rf"^    {option}: ", text, re.MULTILINE), option


def test_a_group_of_the_shared_options_runs() -> None:
    W = nn.Parameter(torch.zeros(6, 4))
    optimizer = steepest.Muon([W], split=(2, 4), heads=2, nonfinite="raise", stochastic_rounding=True, rounding_seed=3)
    W.grad = torch.ones(6, 4)
    optimizer.step()
    assert W.abs().sum() > 0


# Construction.


def test_errors_of_a_call_name_the_class() -> None:
    with pytest.raises(TypeError, match=r"SOAP\.__init__\(\) missing 1 required positional argument: 'params'"):
        steepest.SOAP()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="multiple values for keyword argument 'solver'"):
        steepest.REKLS([nn.Parameter(torch.zeros(2, 2))], solver="qr")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"SOAP has one form; .* is steepest\.InverseRootSOAP"):
        steepest.SOAP([nn.Parameter(torch.zeros(2, 2))], form="inverse_root")  # type: ignore[call-arg]


def test_the_inverse_root_formula_has_one_decay_by_two_names() -> None:
    W = [nn.Parameter(torch.zeros(2, 2))]
    assert steepest.InverseRootSOAP(W, preconditioner_decay=0.7).defaults["shampoo_beta"] == 0.7
    assert steepest.Optimizer(W, "inverse_root", lr=0.1, preconditioner_decay=0.7).defaults["shampoo_beta"] == 0.7
    assert steepest.InverseRootSOAP(W, shampoo_beta=0.7).defaults["shampoo_beta"] == 0.7  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"preconditioner_decay=0\.95 contradicts shampoo_beta=0\.9"):
        steepest.InverseRootSOAP(W, preconditioner_decay=0.95, shampoo_beta=0.9)  # type: ignore[call-arg]
