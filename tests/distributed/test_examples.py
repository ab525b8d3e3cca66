"""The example trains under every layout, and resumes from its checkpoint on other ranks in another layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"


def launch(ranks: int, *options: str) -> str:
    """Return what the example prints on ``ranks`` processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a port of its own
    command = [*run, "--nproc-per-node", str(ranks), str(EXAMPLE), *options]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("fsdp", 2), ("ddp", 2)),
        pytest.param(("ddp", 2), ("hsdp", 4), marks=pytest.mark.slow),
        pytest.param(("hsdp", 4), ("tp", 2), marks=pytest.mark.slow),
        pytest.param(("tp", 2), ("fsdp", 3), marks=pytest.mark.slow),
    ],
    ids=lambda how: f"{how[0]} on {how[1]}",
)
def test_it_trains_and_goes_on_elsewhere(tmp_path: Path, first: tuple[str, int], then: tuple[str, int]) -> None:
    for (how, ranks), steps in ((first, 2), (then, 4)):
        options = ["--parallel", how, "--steps", str(steps), "--save-every", "2", "--checkpoint", str(tmp_path)]
        said = launch(ranks, *options)
        assert ("step 0" in said) == (steps == 2)  # the second run starts where the first ended
    assert sorted(file.parent.name for file in tmp_path.glob("*/.metadata")) == ["2", "4"]
