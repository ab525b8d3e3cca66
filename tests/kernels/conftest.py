"""Where kernels run in these tests: on a GPU, or on the CPU in Triton's interpreter.

Triton decides when it is imported whether it interprets, and other tests import it to compile. So test_interpreter.py
starts a process with TRITON_INTERPRET=1 for the files test_*_kernel.py; in others they are collected only on a GPU.
"""

import sys
from pathlib import Path

import pytest
import torch

from steepest import kernels

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # where gates.py is
sys.path.append(str(Path(__file__).parent))

collect_ignore_glob = [] if kernels.INTERPRETED or torch.cuda.is_available() else ["test_*_kernel.py"]


@pytest.fixture
def device():
    pytest.importorskip("triton", reason="Triton isn't installed: it comes with the dev extra on Linux")
    return torch.device("cpu" if kernels.INTERPRETED else "cuda")


@pytest.fixture
def launched(device, monkeypatch):
    """Record the calls of kernels, so that a test does not compare the twin with itself."""
    from steepest.kernels import adam, keeping, symmetric

    calls = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

    count(symmetric, "_launch")
    count(adam, "adam")
    count(keeping, "put_back")
    return calls


@pytest.fixture
def normal(device):
    """Normal numbers of a given shape, repeatable."""

    def numbers(*shape, seed=0, dtype=torch.float32):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    return numbers
