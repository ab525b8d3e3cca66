"""Fixtures of ranks that stay up, because starting a process takes seconds, and a test milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # modules are imported by name, here and in each rank

from ranks import Ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Yield four ranks over gloo."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Yield two ranks over gloo."""
    with Ranks(2) as ranks:
        yield ranks
