"""Our optimizers keep every clause of the contract, new ones as soon as they have a name; the suite is not too strict.

What the engine keeps for all rules alike is asked of a few here, and of all in the long tests. That the suite is
strict enough is shown in test_mutants.py.
"""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import fed
import pytest
import torch
from asking import BY_ENGINE, asked
from torch import nn

import steepest
from steepest.optimizers import NAMES
from steepest.rules import RULES
from steepest.testing import CLAUSES, Verdict, check_clause, check_optimizer
from steepest.testing.subject import Factory, Subject

FAST = [name for name, clause in CLAUSES.items() if not clause.slow]
SLOW = [name for name, clause in CLAUSES.items() if clause.slow]

AT_EACH: dict[str, Any] = {"precondition_frequency": 1}
SOAP_VARIANTS: dict[str, dict[str, Any]] = {
    "soap f=3": {"precondition_frequency": 3},
    "soap stagger": {"precondition_frequency": 3, "stagger": True},
    "soap kl": {"use_kl_shampoo": True},
    "soap eigh": {"solver": "eigh"},
    "soap after": {"basis_timing": "after", "precondition_frequency": 2},
    "soap warmup": {"adam_warmup_steps": 3},
    "soap one-sided": {"max_precond_dim": 3},
    "soap adaptive": {"use_adaptive_criteria": True, "adaptive_update_tolerance": 0.1},
    "soap async": {"refresh_async": True, "precondition_frequency": 2},
    "soap in fewer bytes": {"basis_dtype": "bfloat16", "moment_dtype": "int8", "precondition_frequency": 2},
    "soap vectors": {"precondition_1d": True, "merge_dims": False},
}


def by_name(params: Any, name: str, **options: Any) -> torch.optim.Optimizer:
    return steepest.create(name, params, **{"lr": 1e-2} | options)


def by_rule(params: Any, rule: str, **options: Any) -> torch.optim.Optimizer:
    return steepest.Optimizer(params, rule, **{"lr": 1e-2} | options)


OURS: dict[str, Factory] = {
    **{name: functools.partial(by_name, name=name) for name in NAMES if NAMES[name].rule not in fed.CAPTURING},
    **{f"rule {rule}": functools.partial(by_rule, rule=rule) for rule in RULES if rule not in NAMES},
    **{f"rule {rule}": functools.partial(fed.optimizer, rule=rule, lr=1e-2) for rule in fed.CAPTURING},
    **{name: functools.partial(by_name, name="soap", **AT_EACH | own) for name, own in SOAP_VARIANTS.items()},
}
for rule in ("muon", "dion", "lion", "adamw"):
    OURS[f"{rule} in fewer bytes"] = functools.partial(by_rule, rule=rule, moment_dtype="int8")
BFLOAT16 = {"soap bfloat16": "soap", "adamw bfloat16": "adamw"}
NOT_ASKED = {
    "has neither betas nor momentum": {"betas_reread", "cycled_momentum", "bad_betas"},
    "requires no closure": {name for name, clause in CLAUSES.items() if clause.closure},
}
"""What may not apply to ours, by the reason; Dion2 calls its decay by another name."""


@functools.cache
def subject(name: str) -> Subject:
    if name in BFLOAT16:  # steps that show in numbers of eight bits
        return Subject(functools.partial(by_rule, rule=BFLOAT16[name], lr=0.1), torch.bfloat16)
    return Subject(OURS[name])


STATEFUL = {4, 7, 9, 12, 13, 16, 17}
"""Chapters that SOAP's options have a say in; the others are asked of SOAP as it is."""


ON_PURPOSE = {
    ("soap in fewer bytes", "float32_state"),
    ("soap stagger", "reordered_parameters"),
    ("soap stagger", "moved_parameter"),
}
"""What a variant breaks, since that is what it is for: refreshes of parameters without names are dealt by position."""


REPRESENTATIVES = {
    *("soap", "muon", "lion", "rule adamw", "rule kfac"),
    *("soap stagger", "soap async", "soap in fewer bytes"),  # whose state or clocks the engine treats otherwise
}
"""Who is asked everything, for all others."""
PAIRS = [
    (name, clause)
    for name in [*OURS, *BFLOAT16]
    for clause in FAST
    if name not in SOAP_VARIANTS or CLAUSES[clause].number in STATEFUL
]


@pytest.mark.parametrize(("name", "clause"), asked([pair for pair in PAIRS if pair not in ON_PURPOSE], REPRESENTATIVES))
def test_ours_keep_it(name: str, clause: str) -> None:
    finding = check_clause(CLAUSES[clause], subject(name))
    assert finding.verdict is not Verdict.BROKEN, finding.why
    if finding.verdict is Verdict.NOT_APPLICABLE:
        assert clause in NOT_ASKED[finding.why]


def test_every_clause_is_asked_in_every_run() -> None:
    assert {*CLAUSES} > BY_ENGINE
    for name in REPRESENTATIVES - {*SOAP_VARIANTS}:
        assert {clause for other, clause in PAIRS if other == name} == {*FAST}


@pytest.mark.slow
@pytest.mark.parametrize("clause", SLOW)
@pytest.mark.parametrize("name", OURS)
def test_ours_keep_slow_ones(name: str, clause: str) -> None:
    finding = check_clause(CLAUSES[clause], subject(name))
    assert finding.verdict is Verdict.KEPT, finding.why


@pytest.mark.parametrize("name", OURS)
def test_ours_take_parameters_of_any_shape(name: str) -> None:
    assert not subject(name).refused


def test_torch_keeps_the_rest() -> None:
    """What torch.optim.AdamW breaks is known, and nothing else is held against it."""
    report = check_optimizer(torch.optim.AdamW)
    assert {finding.clause.name for finding in report.broken} == {
        "resume_by_name",  # documented: names don't affect loading
        "damaged_state",
        "nan_gradient",
        "infinite_gradient",
        "overflow",
        "bad_gradient_waits",
        "bad_gradient_resumes",
        "float32_state",
    }, str(report)
    assert {finding.why for finding in report.not_applicable} == {"requires no closure"}


def test_sgd_without_momentum() -> None:
    """An optimizer without state can't be asked about state."""
    report = check_optimizer(functools.partial(torch.optim.SGD, lr=1e-3))
    asked_of_state = {"damaged_state", "float32_state", "replaced_state", "cleared_state"}
    not_asked = {finding.clause.name for finding in report.not_applicable}
    assert not_asked == asked_of_state | NOT_ASKED["requires no closure"]
    assert "resume_by_name" in {finding.clause.name for finding in report.kept}


# The report.


def test_report_is_a_table() -> None:
    report = check_optimizer(torch.optim.Muon, name="Muon", only=["closure", "nan_gradient", "random_state"])
    lines = str(report).splitlines()
    assert lines[0] == "Muon: 2 clauses kept, 1 broken, 0 not applicable"
    refused = [line for line in lines if line.startswith("not given")]
    assert len(refused) == 3
    assert all("Muon only supports 2D parameters" in line for line in refused)
    rows = lines[1 + len(refused) :]
    assert len({re.search(r"  (kept|broken)", row).start() for row in rows}) == 1  # type: ignore[union-attr]
    assert [clause.name for clause in (f.clause for f in report.kept)] == ["closure", "random_state"]
    assert not report.ok


def test_clauses_are_documented_and_in_order() -> None:
    numbers = [clause.number for clause in CLAUSES.values()]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, 19))
    for clause in CLAUSES.values():
        assert len(clause.promise) > 40, clause.name
    titles = [clause.title for clause in CLAUSES.values()]
    assert len(titles) == len(set(titles))


def test_what_cannot_be_checked() -> None:
    def refuses(params: Any, **options: Any) -> torch.optim.Optimizer:
        raise RuntimeError("no")

    with pytest.raises(ValueError, match="no parameter could be optimized: RuntimeError: no"):
        check_optimizer(refuses)
    with pytest.raises(ValueError, match="only='closures': no such clause"):
        check_optimizer(torch.optim.AdamW, only=["closures"])


def test_checking_leaves_no_trace() -> None:
    """Neither the global random state nor the warnings' filters are changed by a check."""
    before = torch.get_rng_state()
    check_optimizer(torch.optim.AdamW, only=["random_state", "resume_float32"])
    assert torch.equal(torch.get_rng_state(), before)


# What the contract's clauses can't ask of every optimizer, but we promise.


def two_groups(**options: Any) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    W, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [W], "rule": "soap"}, {"params": [b], "rule": "adamw"}]
    W.grad, b.grad = torch.eye(2, 3), torch.ones(3)
    return W, b, steepest.Optimizer(groups, "soap", lr=0.1, **options)


def test_a_refused_step_changes_nothing() -> None:
    """A step is taken by all parameters or by none: what is refused in the last group spares the first."""
    W, b, optimizer = two_groups()
    b.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    b.grad = torch.ones(3)
    optimizer.param_groups[1]["betas"] = (0.9, 1.5)
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.5\)"):
        optimizer.step()
    assert torch.equal(W, torch.ones(2, 3))
    assert optimizer.state[W]["step"] == 0


def test_nonfinite_may_raise() -> None:
    W, b, optimizer = two_groups(nonfinite="raise")
    W.grad, b.grad = torch.eye(2, 3), torch.full((3,), torch.nan)
    optimizer.param_groups[1]["nonfinite"] = "raise"
    with pytest.raises(FloatingPointError, match=r"parameter 0 of group 1 \(shape \[3\]\)"):
        optimizer.step()
    assert torch.equal(W, torch.ones(2, 3))


def test_skipped_are_counted() -> None:
    W, b, optimizer = two_groups()
    W.grad, b.grad = torch.full((2, 3), torch.inf), torch.full((3,), torch.nan)
    optimizer.step()
    W.grad = torch.eye(2, 3)
    optimizer.step()
    assert optimizer.skipped == 3  # type: ignore[attr-defined]


def test_a_bad_expert_spares_the_others() -> None:
    """Matrices that share a parameter are skipped one by one; the others' steps are the same to the last bit."""

    def train(poison: bool) -> torch.Tensor:
        torch.manual_seed(0)
        experts = nn.Parameter(torch.randn(3, 4, 5))
        optimizer = steepest.SOAP([experts], lr=0.1, merge_dims=False)
        for k in range(4):
            experts.grad = torch.randn(3, 4, 5)
            if poison and k in (0, 2):
                experts.grad[1, 2, 3] = torch.nan
            optimizer.step()
        return experts.detach()

    clean, poisoned = train(poison=False), train(poison=True)
    assert torch.equal(clean[[0, 2]], poisoned[[0, 2]])
    assert torch.isfinite(poisoned).all()


# Loading, beyond what torch's own optimizers could promise.


def trained(rule: str = "soap", **options: Any) -> torch.optim.Optimizer:
    W = nn.Parameter(torch.ones(2, 3))
    optimizer = steepest.Optimizer([W], rule, **{"lr": 0.1} | options)
    W.grad = torch.eye(2, 3)
    optimizer.step()
    return optimizer


def edited(**changes: Any) -> dict[str, Any]:
    state = trained().state_dict()
    state["param_groups"][0] |= changes
    return state


@pytest.mark.parametrize(
    ("saved", "complaint"),
    [
        (edited(betas=(0.9, 1.5)), r"betas=\(0.9, 1.5\)"),
        (edited(lr=-1.0), "lr=-1.0"),
        (edited(rule="muon"), "saved under 'muon'"),
        (trained("adamw").state_dict(), "saved under 'adamw'"),
        (trained(max_precond_dim=2).state_dict(), r"max_precond_dim=2 \(here 8192\)"),
        ({"model": {}}, "no 'state' and 'param_groups', only model"),
    ],
    ids=["betas", "lr", "rule edited", "another rule", "other options", "another file"],
)
def test_what_does_not_fit_is_refused(saved: dict[str, Any], complaint: str) -> None:
    optimizer = trained()
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=complaint):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(x, after["state"][0][name]) for name, x in before["state"][0].items())


def test_more_than_fits_is_refused_too() -> None:
    """Moments of a two-sided basis mean nothing to a one-sided one, though every tensor that it needs is there."""
    with pytest.raises(ValueError, match=r"max_precond_dim=8192 \(here 2\)"):
        trained(max_precond_dim=2).load_state_dict(trained().state_dict())


def test_a_loaded_tensor_rate_is_a_copy() -> None:
    first, second = trained(lr=torch.tensor(0.1)), trained(lr=torch.tensor(0.1))
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["lr"].fill_(0.5)
    assert second.param_groups[0]["lr"] == torch.tensor(0.1)


def test_a_loaded_state_is_a_copy() -> None:
    first, second = trained(), trained()
    saved = first.state_dict()
    kept = copy.deepcopy(saved["state"])
    second.load_state_dict(saved)
    second.step()
    first.step()
    assert all(torch.equal(x, saved["state"][0][name]) for name, x in kept[0].items())
