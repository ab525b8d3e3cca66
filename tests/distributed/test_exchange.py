"""Several ranks give what one process gives, bit for bit, and send what was planned."""

from __future__ import annotations

from typing import Any

import between
import jobs
import pytest
import torch
from models import LAYOUTS
from ranks import Ranks

from steepest.rule import Rule
from steepest.rules import RULES

MATRIX_RULES = sorted(name for name, rule in RULES.items() if issubclass(rule, Rule) and not rule.captures)
VARIANTS = {
    "bfloat16": ("soap", torch.bfloat16, {}),
    "stochastic rounding": ("soap", torch.bfloat16, {"stochastic_rounding": True}),
    "staggered": ("soap", torch.float32, {"stagger": True, "precondition_frequency": 3}),
    "decay as a gradient": ("soap", torch.float32, {"weight_decay_method": "l2"}),
    "cautious decay": ("muon", torch.float32, {"weight_decay_method": "cautious"}),
    "float64": ("muon", torch.float64, {}),
    "in fewer bytes": ("soap", torch.float32, {"basis_dtype": "bfloat16", "moment_dtype": "int8"}),
    "lion in fewer bytes": ("lion", torch.float32, {"moment_dtype": "int8"}),
    "adamw in fewer bytes": ("adamw", torch.bfloat16, {"moment_dtype": "int8"}),
    "refresh after the step": ("soap", torch.float32, {"refresh_async": True, "precondition_frequency": 2}),
}


QUICK = {"soap", "kl_soap", "shampoo", "moso", "muon", "dion"}
"""Rules that differ in what they keep and send; all rules in all layouts are in the long tests."""


def slowly(*values: str) -> Any:
    """Mark a case that runs on demand."""
    return pytest.param(*values, marks=pytest.mark.slow)


def everywhere(results: list[list[str]]) -> list[str]:
    """Return the parameters that differ on any rank."""
    return sorted({name for names in results for name in names})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_one_process(four: Ranks, layout: str) -> None:
    assert everywhere(four.run(jobs.same_as_one_process, layout, "soap", torch.float32, {})) == []


@pytest.mark.parametrize("rule", [rule if rule in QUICK else slowly(rule) for rule in MATRIX_RULES])
def test_every_rule_is_one_process(two: Ranks, rule: str) -> None:
    assert everywhere(two.run(jobs.same_as_one_process, "fsdp", rule, torch.float32, {})) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_are_as_in_one_process(two: Ranks, variant: str) -> None:
    rule, dtype, options = VARIANTS[variant]
    assert everywhere(two.run(jobs.same_as_one_process, "fsdp", rule, dtype, options)) == []


@pytest.mark.parametrize("layout", ["fsdp", slowly("ddp"), slowly("hsdp"), slowly("tp")])
def test_a_caller_s_surroundings_change_nothing(four: Ranks, layout: str) -> None:
    assert everywhere(four.run(jobs.in_other_surroundings, layout)) == []


@pytest.mark.parametrize("layout", ["fsdp", slowly("hsdp")])
def test_blocks_find_owners_of_their_own(four: Ranks, layout: str) -> None:
    # Blocks are multiples of 64 bytes, because BLAS may round differently where a matrix starts at an odd address.
    assert everywhere(four.run(jobs.same_as_one_process, layout, "soap", torch.float32, {"block_size": 4}, 40)) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_all_of_it_is_one_process(four: Ranks, layout: str, rule: str) -> None:
    assert everywhere(four.run(jobs.same_as_one_process, layout, rule, torch.float32, {})) == []
    for name in VARIANTS:
        _, dtype, options = VARIANTS[name]
        if not options.keys() - {"weight_decay_method", "stochastic_rounding"}:
            assert everywhere(four.run(jobs.same_as_one_process, layout, rule, dtype, options)) == [], name


@pytest.mark.parametrize(
    ("layout", "rule"), [("fsdp+tp", "muon"), slowly("ddp", "muon"), slowly("hsdp", "muon"), slowly("tp", "muon")]
)
def test_real_gradients_train_as_one_process(four: Ranks, layout: str, rule: str) -> None:
    # SOAP and Shampoo are left out: while gradients are rank-deficient, another order of a sum turns their bases.
    assert max(four.run(jobs.trains_as_one_process, layout, rule)) < 1e-5


def test_blocks_of_moments_are_not_cut(four: Ranks) -> None:
    """Tensor parallelism cuts columns, too."""
    for said in four.run(jobs.refusal, "tp", "lion", {"moment_dtype": "int8"}):
        assert "key.weight of shape [12, 12] is sharded within rows, and lion with moment_dtype='int8' needs" in said


@pytest.mark.parametrize("layout", ["fsdp", slowly("ddp"), slowly("fsdp+tp")])
def test_a_gradient_missing_on_some_ranks_is_missing_on_all(four: Ranks, layout: str) -> None:
    assert everywhere(four.run(jobs.with_missing, layout, "soap")) == []


@pytest.mark.parametrize("layout", ["fsdp", slowly("ddp")])
def test_frozen_parameters_and_added_groups(two: Ranks, layout: str) -> None:
    assert everywhere(two.run(jobs.with_frozen, layout, "soap")) == []


def test_decay_is_a_gradient_in_one_group_of_two(two: Ranks) -> None:
    assert everywhere(two.run(jobs.with_one_penalty, "ddp")) == []


@pytest.mark.parametrize("layout", ["fsdp", slowly("ddp")])
def test_mixed_dtypes(two: Ranks, layout: str) -> None:
    assert everywhere(two.run(jobs.with_mixed_dtypes, layout, "soap")) == []


@pytest.mark.parametrize("layout", ["hsdp", slowly("ddp")])
def test_nan_leaves_no_trace_on_any_rank(four: Ranks, layout: str) -> None:
    for differing, here, there in four.run(jobs.poison, layout, "soap"):
        assert differing == []
        assert here == there == 3


def test_all_ranks_raise_for_what_one_sees(four: Ranks) -> None:
    for said, changed in four.run(jobs.refuses_nan, "fsdp"):
        assert "up.weight" in said
        assert changed == []


def test_ranks_of_unlike_machines_compute_alike(two: Ranks) -> None:
    assert two.run(jobs.measured_by_one, 0) == two.run(jobs.measured_by_one, 1) == ["float32", "float32"]
    assert two.run(jobs.measured_by_one, None) == ["bfloat16", "bfloat16"]


def test_nothing_outlives_a_destroyed_group(two: Ranks) -> None:
    assert two.run(jobs.outlives, "ddp") == [[], []]


def test_ranks_that_plan_differently_are_told(two: Ranks) -> None:
    assert all("differs between the ranks" in said for said in two.run(jobs.disagreement))


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp", slowly("tp"), slowly("fsdp+tp")])
def test_bytes_are_as_planned(four: Ranks, layout: str) -> None:
    for seen in four.run(jobs.traffic, layout, "soap"):
        assert seen["sent"] == seen["planned"]
        assert seen["calls"].pop("all_to_all_single", 0) == 2 * seen["buckets"]
        assert set(seen["calls"]) <= {"all_reduce"}
    assert layout == "tp" or seen["buckets"] > 0


def test_low_rank_directions_travel_in_factors(four: Ranks) -> None:
    whole, factors = (four.run(jobs.traffic, "ddp", rule) for rule in ("dion2", "dion"))
    assert sum(seen["sent"] for seen in factors) < 0.6 * sum(seen["sent"] for seen in whole)
    assert all(seen["sent"] == seen["planned"] for seen in factors)
    assert everywhere(four.run(jobs.same_as_one_process, "ddp", "dion", torch.float32, {})) == []


@pytest.mark.slow
def test_low_rank_directions_are_rounded_and_left_out_as_others_are(four: Ranks) -> None:
    rounded = {"stochastic_rounding": True}
    assert everywhere(four.run(jobs.same_as_one_process, "ddp", "dion", torch.bfloat16, rounded)) == []
    assert everywhere([differing for differing, *_ in four.run(jobs.poison, "ddp", "dion")]) == []


@pytest.mark.parametrize("holders", [[0], [1, 3]], ids=str)
def test_what_fewer_ranks_step_in_between_keeps_nobody_waiting(four: Ranks, holders: list[int]) -> None:
    """One or two ranks step one more matrix between those of all ranks: all call the same, in the same order."""
    seen = four.run(between.calls, holders, timeout=30)
    for calls in zip(*seen, strict=True):
        names, sent, received = zip(*calls, strict=True)
        assert len(set(names)) == 1
        if names[0] == "all_to_all_single":
            assert list(zip(*sent, strict=True)) == [tuple(row) for row in received]
        else:
            assert sent == (sent[0],) * len(sent)
    assert everywhere(four.run(between.unlike_one_process, holders, timeout=30)) == []


def test_work_is_even(four: Ranks) -> None:
    for rule in ("muon", "soap"):
        flops, planned = zip(*four.run(jobs.balance, rule), strict=True)
        assert max(flops) <= 1.2 * sum(flops) / 4
        assert max(planned) <= 1.2 * sum(planned) / 4


@pytest.mark.parametrize("kind", jobs.MUTATIONS)
def test_mutations_are_seen(four: Ranks, kind: str) -> None:
    assert everywhere(four.run(jobs.mutated, kind)) != []
