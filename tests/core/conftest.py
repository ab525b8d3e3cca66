from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from steepest.stack import graphs

sys.path.insert(0, str(Path(__file__).parent))  # what test files share is imported by name

from training_in_graphs import Backend


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    torch._dynamo.reset()
    backend = Backend()
    monkeypatch.setattr(graphs, "BACKEND", backend)
    return backend
