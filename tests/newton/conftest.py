"""Golden numbers, which these tests share with tests/reference."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what test files share is imported by name

GOLDEN = Path(__file__).parents[1] / "reference" / "golden"


@pytest.fixture
def golden():
    """Read a golden file: ``golden("curvature_products")``."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
