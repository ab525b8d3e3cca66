"""Accelerate's calls, by hand: what it does to optimizers under DDP and FSDP2 changes no bit of a training."""

from __future__ import annotations

from pathlib import Path

import hosted
import pytest
from ranks import Ranks


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        *(("fsdp", "soap"), ("ddp", "muon")),
        pytest.param("ddp", "soap", marks=pytest.mark.slow),
        pytest.param("fsdp", "muon", marks=pytest.mark.slow),
    ],
)
def test_six_steps_and_a_resume_are_those_of_a_plain_script(two: Ranks, layout: str, rule: str, tmp_path: Path) -> None:
    assert two.run(hosted.compared, layout, rule, str(tmp_path)) == [{"whole": [], "resumed": []}] * 2
