from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from steepest.stack import graphs

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # what test files share, by name

from training_in_graphs import Backend  # noqa: E402


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    torch._dynamo.reset()
    backend = Backend()
    monkeypatch.setattr(graphs, "BACKEND", backend)
    return backend
