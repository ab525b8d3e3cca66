"""Runs the tests of the kernels in a process whose Triton interprets; see conftest.py."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from steepest import kernels

FILES = sorted(Path(__file__).parent.glob("test_*_kernel.py"))

pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton isn't installed: it comes with the dev extra on Linux"),
    pytest.mark.skipif(kernels.INTERPRETED, reason="this is that process"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """One process for all files, since starting it takes as long as a file: what it printed, and its report."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("STEEPEST_KERNELS", None)
    command = [sys.executable, "-m", "pytest", *map(str, FILES), "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    said = run.stdout[-5000:] + run.stderr[-2000:]
    assert run.returncode in (0, 1), said  # else it has broken down, and not only tests have failed
    return said, ElementTree.parse(report).getroot()


@pytest.mark.parametrize("file", [path.name for path in FILES])
def test_kernels_interpreted(outcomes, file):
    said, report = outcomes
    cases = [case for case in report.iter("testcase") if case.get("classname").endswith(file.removesuffix(".py"))]
    assert not [case.get("name") for case in cases if case.find("failure") is not None], said
    assert not [case.get("name") for case in cases if case.find("error") is not None], said
    assert sum(len(case) == 0 for case in cases) > 5, said  # not just skipped
