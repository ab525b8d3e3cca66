from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # what test files share is imported by name


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


GOLDEN = Path(__file__).parents[1] / "reference" / "golden"


@pytest.fixture
def golden() -> Callable[[str], Any]:
    """Read a golden file: ``golden("kfac_exact")``."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
