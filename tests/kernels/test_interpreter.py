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


def interpreted(folder, *options, seconds):
    """One process for all files, since starting it takes as long as a file: what it printed, and its report."""
    report = folder / "report.xml"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("STEEPEST_KERNELS", None)
    fixed = ["-p", "no:cacheprovider", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *map(str, FILES), *fixed, *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    said = run.stdout[-5000:] + run.stderr[-2000:]
    assert run.returncode in (0, 1), said  # else it has broken down, and not only tests have failed
    return said, ElementTree.parse(report).getroot()


def passed(said, cases):
    """The number of tests that passed; none may have failed."""
    for outcome in ("failure", "error"):
        assert not [case.get("name") for case in cases if case.find(outcome) is not None], said
    return sum(len(case) == 0 for case in cases)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return interpreted(tmp_path_factory.mktemp("interpreted"), seconds=280)


@pytest.mark.parametrize("file", [path.name for path in FILES])
def test_kernels_interpreted(outcomes, file):
    said, report = outcomes
    cases = [case for case in report.iter("testcase") if case.get("classname").endswith(file.removesuffix(".py"))]
    assert passed(said, cases) > 5, said  # not just skipped


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_takes_long_interpreted(tmp_path):
    said, report = interpreted(tmp_path, "-m", "slow", seconds=1700)
    assert passed(said, list(report.iter("testcase"))) > 50, said
