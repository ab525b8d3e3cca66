"""Runs the tests of the kernels in a process whose Triton interprets; see conftest.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from steepest import kernels


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton isn't installed: it comes with the dev extra on Linux")
@pytest.mark.skipif(kernels.INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("file", sorted(path.name for path in Path(__file__).parent.glob("test_*_kernel.py")))
def test_kernels_interpreted(file):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("STEEPEST_KERNELS", None)
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name(file)), "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 5, run.stdout  # not just skipped
