"""FSDP1 and DeepSpeed's ZeRO cut matrices into flat parts, which is refused; ZeRO-1 over DDP keeps them whole."""

from __future__ import annotations

import pytest
import torch
import wrappers
from models import toy
from ranks import Ranks
from torch import nn

from steepest import Optimizer

FORMS = pytest.mark.parametrize("use_orig_params", [True, False])


@pytest.mark.parametrize(("rule", "use_orig_params"), [("soap", True), ("muon", False)])
def test_no_matrix_rule_steps_what_fsdp1_has_flattened(two: Ranks, rule: str, use_orig_params: bool) -> None:
    for said in two.run(wrappers.refused, rule, use_orig_params):
        assert len(said) == 2
        assert all("cut into flat parts by FSDP1" in text and "fully_shard" in text for text in said)


@FORMS
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_elementwise_rules_step_flat_parts(two: Ranks, rule: str, use_orig_params: bool) -> None:
    options = {"weight_decay": 0.1}
    for one, many in two.run(wrappers.flat_parts, rule, use_orig_params, options):
        torch.testing.assert_close(many, one)
        assert not torch.equal(many[0], many[-1])
    if rule == "adamw":
        torch.testing.assert_close(two.run(wrappers.flat_parts_of_torch, use_orig_params, options)[0], one)
        assert two.run(wrappers.warned, use_orig_params) == [[], []]


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_parameters_that_deepspeed_has_marked(mark: str) -> None:
    W = nn.Parameter(torch.zeros(0))
    setattr(W, mark, 0)
    with pytest.raises(ValueError, match=r"W of shape \[0\] is cut into flat parts by DeepSpeed's ZeRO.*fully_shard"):
        Optimizer([("W", W)], rule="soap", lr=0.1)
    Optimizer([("W", W)], rule="adamw", lr=0.1)


@pytest.mark.parametrize("grouped", [True, False])
def test_flat_parts_that_come_later(grouped: bool) -> None:
    """ZeRO puts one flat part into each group, in the place of its parameters, once the optimizer has been made."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    opt = Optimizer([{"params": [p]} for p in model.parameters()] if grouped else model.parameters(), "muon", lr=0.1)
    for group in opt.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    before = [group["params"][0].clone() for group in opt.param_groups]
    with pytest.raises(ValueError, match=r"cut into flat parts.*fully_shard"):
        opt.step()
    assert all(torch.equal(group["params"][0], x) for group, x in zip(opt.param_groups, before, strict=True))


@pytest.mark.parametrize(("rule", "as_views"), [("soap", True), ("muon", False)])
def test_zero_1_is_one_process(four: Ranks, rule: str, as_views: bool) -> None:
    differing, counts = zip(*four.run(wrappers.divided, rule, as_views), strict=True)
    assert not any(differing)
    assert sum(counts) == len(list(toy().parameters())) > max(counts)


def test_zero_1_leaves_ranks_without_parameters(four: Ranks) -> None:
    differing, counts = zip(*four.run(wrappers.divided_one, "soap", False), strict=True)
    assert not any(differing)
    assert counts == (1, 1, 0, 0)


def test_another_order_on_one_rank_is_refused_on_all(two: Ranks) -> None:
    assert all("the order of the parameters differs" in said for said in two.run(wrappers.reordered))
