"""Diagnostics between ranks tell what is here, and QK-clip clips by the largest logit of all."""

from __future__ import annotations

import math
from typing import Any

import observed
import pytest
import torch
from ranks import Ranks


def slowly(*values: str) -> Any:
    """Mark a case that runs on demand."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("layout", "rule"), [("ddp", "muon"), ("fsdp", "soap"), slowly("ddp", "soap")])
def test_ranks_tell_together_what_one_process_tells(two: Ranks, layout: str, rule: str) -> None:
    found = two.run(observed.told, layout, rule)
    one = found[0][1]
    for key in (rule, "adamw"):
        squares = sum(many[f"{key}/update_rms"] ** 2 * entries[key] for many, _, entries in found)
        rms = math.sqrt(squares / sum(entries[key] for _, _, entries in found))
        assert rms == pytest.approx(one[f"{key}/update_rms"], rel=1e-5)
        if layout == "ddp":
            assert found[1][0][f"{key}/update_to_weight"] == pytest.approx(one[f"{key}/update_to_weight"], rel=1e-5)
    for what in ("condition_number", "refresh_age") if rule == "soap" else ():
        largest = max(many.get(f"soap/{what}", 0.0) for many, _, _ in found)
        assert largest == pytest.approx(one[f"soap/{what}"], rel=1e-4)


def test_all_ranks_clip_by_the_largest_logit(two: Ranks) -> None:
    (first, none), (second, logit) = two.run(observed.clipped)
    assert all(map(torch.equal, first, second))
    assert none == -math.inf
    assert logit == pytest.approx(0.1, rel=1e-5)
