"""Accelerate, installed, on two ranks: DDP and FSDP2 through it are those of a plain script."""

import pytest
from plain import host
from ranks import Ranks

host("accelerate")
KINDS = {"ddp": {"Parameter"}, "fsdp": {"DTensor"}}


@pytest.fixture(scope="module")
def two():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("rule", ["soap", "muon"])
@pytest.mark.parametrize("layout", KINDS)
def test_six_steps_and_a_resume_are_those_of_a_plain_script(two, layout, rule, tmp_path):
    import accelerated

    found = two.run(accelerated.compared, layout, rule, str(tmp_path))
    assert found == [{"kinds": KINDS[layout], "whole": [], "resumed": []}] * 2
