from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what test files share is imported by name

GOLDEN = Path(__file__).parents[1] / "reference" / "golden"


@pytest.fixture
def golden() -> Callable[[str], Any]:
    """Read a golden file: ``golden("kfac_exact")``."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
