"""The tests that run on a GPU where there is one: kernels, optimizers on the device, replays of CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gpu.record import Record, Unavailable

ROOT = Path(__file__).resolve().parents[2]
TESTS = (*sorted(ROOT.glob("tests/kernels/test_*_kernel.py")), ROOT / "tests/core/test_graphs.py")


def run(record: Record) -> None:
    """Run the tests by pytest; in a test of this script they are only collected."""
    if find_spec("pytest") is None:
        raise Unavailable("needs pytest, pytest-timeout and hypothesis")
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *map(str, TESTS)]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        words + ["--collect-only"] * record.tiny,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=record.left,
    )
    output = (done.stdout + done.stderr).strip().splitlines()
    record.figures["output"] = output[-60:]
    if done.returncode:
        raise AssertionError(output[-1] if output else f"pytest ended with status {done.returncode}")
