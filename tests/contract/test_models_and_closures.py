"""Optimizers that take a model or require a closure keep the contract, as far as it can be asked of them."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import standins
import torch
from asking import asked

import steepest
from steepest.testing import CLAUSES, Verdict, check_clause, check_optimizer
from steepest.testing.sources import ANSWERS, Batch, Evaluated
from steepest.testing.subject import Factory, Subject

SELDOM = {"settle": 0, "statistics_frequency": 2, "precondition_frequency": 3, "fisher": "sampled"}
OF_MODELS: dict[str, Factory] = {
    "kfac": steepest.KFAC,
    "kfac unclipped": functools.partial(steepest.KFAC, lr=1e-2, kl_clip=0.0),
    "kfac seldom": functools.partial(steepest.KFAC, **SELDOM),
    "kfac eigen": functools.partial(steepest.KFAC, form="eigen", sharing="reduce"),
    "ekfac": steepest.EKFAC,
    "ekfac seldom": functools.partial(steepest.EKFAC, **SELDOM),
}
BY_CLOSURE: dict[str, Factory] = {
    "lbfgs": functools.partial(steepest.LBFGS, max_iter=2, history_size=3),  # which is seldom at a minimum
    "lbfgs without search": functools.partial(steepest.LBFGS, max_iter=4, line_search=None),
    "newton-cg": steepest.NewtonCG,
    "newton-cg ggn": functools.partial(steepest.NewtonCG, curvature="ggn"),
    "newton-cg fisher": functools.partial(steepest.NewtonCG, curvature="fisher", likelihood="normal"),
    "natural-gradient": functools.partial(steepest.NaturalGradient, likelihood="normal"),
    "natural-gradient cg": functools.partial(steepest.NaturalGradient, likelihood="normal", solver="cg"),
    "gauss-newton": functools.partial(steepest.GaussNewton, rank=3, products=60),
    "gauss-newton dense": functools.partial(steepest.GaussNewton, solver="dense"),
}
OURS = OF_MODELS | BY_CLOSURE

NOT_ASKED_OF_MODELS = {
    r"requires no closure": {name for name, clause in CLAUSES.items() if clause.closure},
    r"takes a model, ": {
        "parameter_forms",
        "names_survive",
        "empty_group",
        "added_group",
        "replaced_parameters",
        "reordered_parameters",
        "moved_parameter",
    },
    r"the gradient of one parameter has a say": {
        "missing_leaves_clock",
        "bad_gradient_isolated",
        "bad_gradient_resumes",
    },
}
NOT_ASKED_BY_CLOSURE = {
    r"has (no|neither) ": {
        *("betas_reread", "cycled_momentum", "bad_betas"),
        *("own_options", "lr_reread", "decay_reread", "tensor_lr", "schedulers"),
        *("idle_step", "bad_lr", "bad_decay_or_eps"),
    },
    r"moves all parameters as one vector": {"own_options", "missing_leaves_state"},
    r"the gradient of one": NOT_ASKED_OF_MODELS["the gradient of one parameter has a say"],
    r"GradScaler does not support closures": {"scaler", "skipped_by_scaler"},
    r"its closure (sets gradients|returns a loss in a graph)": {"gradients_unchanged", "no_gradients"},
    r"makes its gradients itself": {"sparse_gradients"},
    r"refuses parameters in bfloat16": {"resume_bfloat16", "float32_state"},
    r"keeps no tensors": {"damaged_state", "replaced_state"},
    r"uses nothing of its state": {"replaced_state"},
    r"takes a model, ": {"replaced_parameters"},
}


ON_PURPOSE = {
    ("kfac seldom", "cleared_state"),
    ("ekfac seldom", "cleared_state"),
    ("lbfgs without search", "closure_nonfinite"),
    ("lbfgs without search", "closure_descends"),
}
"""What a variant breaks: statistics go by the steps of their group, and without a line search a loss may rise."""
FIRST = {"kfac", "ekfac", "lbfgs", "newton-cg", "natural-gradient", "gauss-newton dense"}
STATEFUL = {4, 7, 12, 17, 18}
"""Chapters that variants of the first have a say in."""
REPRESENTATIVES = {"kfac", "kfac seldom", "lbfgs", "newton-cg"}
"""Who is asked all of that, for all others, which share an engine with one of them."""
PAIRS = [
    (name, clause)
    for name in OURS
    for clause in CLAUSES
    if not CLAUSES[clause].slow
    and (name in FIRST or CLAUSES[clause].number in STATEFUL)
    and (name, clause) not in ON_PURPOSE
]


@functools.cache
def subject(name: str) -> Subject:
    with warnings.catch_warnings(action="ignore"):  # of float32, and of models without layers
        return Subject(OURS[name])


@pytest.mark.parametrize(("name", "clause"), asked(PAIRS, REPRESENTATIVES))
def test_ours_keep_it(name: str, clause: str) -> None:
    finding = check_clause(CLAUSES[clause], subject(name))
    assert finding.verdict is not Verdict.BROKEN, finding.why
    if finding.verdict is Verdict.NOT_APPLICABLE:
        reasons = NOT_ASKED_OF_MODELS if name in OF_MODELS else NOT_ASKED_BY_CLOSURE
        assert any(clause in clauses and re.match(why, finding.why) for why, clauses in reasons.items()), finding.why


@pytest.mark.parametrize("name", OURS)
def test_ours_take_parameters_of_any_shape(name: str) -> None:
    assert not subject(name).refused


def test_lbfgs_goes_by_closure() -> None:
    """What torch.optim.LBFGS breaks is known, and what can't be asked of it is said."""
    told = ("closure", "closure_descends", "plain_state", "closure_groups", "closure_error", "closure_nonfinite")
    told += ("own_options", "scaler")
    report = check_optimizer(functools.partial(torch.optim.LBFGS, max_iter=4), name="L-BFGS", only=told)
    verdicts = {finding.clause.name: finding for finding in report.findings}
    assert verdicts["closure"].verdict is Verdict.KEPT
    assert verdicts["closure_descends"].verdict is Verdict.KEPT
    assert "list in the state" in verdicts["plain_state"].why
    assert "parameter groups" in verdicts["closure_groups"].why
    assert "evaluation 2 raised" in verdicts["closure_error"].why
    assert "evaluations are nan" in verdicts["closure_nonfinite"].why
    assert "as one vector" in verdicts["own_options"].why
    assert verdicts["scaler"].verdict is Verdict.NOT_APPLICABLE


def test_what_takes_a_model_gets_one() -> None:
    """What others might write; what it breaks is due to torch.optim.SGD below it, and to scaled losses."""
    torch.optim.SGD([torch.zeros(1)])  # from now on its step has hooks, which fire in that of Whitens, too
    report = check_optimizer(standins.Whitens)
    assert not report.refused
    assert {finding.clause.name for finding in report.broken} == {
        *("bad_lr", "damaged_state", "float32_state", "resume_bfloat16", "resume_flattened"),
        *("scaler", "skipped_by_scaler", "step_hooks"),
    }, str(report)


@pytest.mark.parametrize(
    "names", [(), ("first.weight",), ("bias", "kernel"), ("gain", "kernel", "bias", "second.weight")]
)
def test_a_model_makes_the_gradients_that_are_drawn(names: tuple[str, ...]) -> None:
    """Those of weights to the last bit, so that runs with and without a model can be compared."""
    model, drawn = subject("kfac"), Subject(torch.optim.AdamW)
    for scale in (1.0, 0.0, 1e30):
        runs = [each.start(names=names) for each in (model, drawn)]
        for run in runs:
            run.set_gradients(3, scale=scale)
        for name, p in runs[0].params.items():
            expected = runs[1].params[name].grad
            torch.testing.assert_close(p.grad, expected, rtol=0 if name != "bias" else 1e-6, atol=1e-6 * scale)
            assert name == "bias" or torch.equal(p.grad, expected)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_closure_has_the_gradients_of_its_loss(answer: str) -> None:
    """Whatever a closure returns, the loss is the same; and the gradient of a parameter depends on no other."""
    subject = Subject(torch.optim.AdamW, torch.float64)
    params, batch = subject.params(), Batch(2, missing=["bias"], scale=3.0)
    losses = []
    for name, other in ((name, other) for name in params for other in params if other != name):
        source = Evaluated(answer, params, takes_model=False)
        (before,) = torch.autograd.grad(source.loss(params, batch), params[name], allow_unused=True)
        with torch.no_grad():
            params[other].add_(0.1)
        (after,) = torch.autograd.grad(source.loss(params, batch), params[name], allow_unused=True)
        assert (before is None and name == "bias") or torch.equal(before, after)
        losses.append(source.closure(params, batch)())
    given = losses[-1][1] if isinstance(losses[-1], tuple) else losses[-1]
    given = given.square().sum() / 2 if given.dim() else given
    torch.testing.assert_close(given, Evaluated("loss", params, takes_model=False).loss(params, batch))
