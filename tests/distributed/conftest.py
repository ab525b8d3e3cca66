"""Ranks that stay up: starting a process that imports torch costs seconds, a test on it milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ranks and what they run are imported by name, here and in each rank

from ranks import Ranks


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four ranks over gloo."""
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two ranks over gloo."""
    with Ranks(2) as ranks:
        yield ranks
