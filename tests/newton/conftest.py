"""Golden numbers, which these tests share with tests/reference."""

import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "reference" / "golden"


@pytest.fixture
def golden():
    """Read a golden file: ``golden("curvature_products")``."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
