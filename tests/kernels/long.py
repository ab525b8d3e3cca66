"""What takes long in Triton's interpreter: it is left to the long tests there, and always run on a GPU."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from typing import Any

import pytest

from steepest import kernels

marks: Any = pytest.mark.slow if kernels.INTERPRETED else ()


def pairs(*lists: Collection[Any]) -> list[Any]:
    """Return all combinations; quick are as many as the longest list has, in which every value occurs."""
    values = [list(each) for each in lists]
    quick = [tuple(each[i % len(each)] for each in values) for i in range(max(map(len, values)))]
    return [pytest.param(*combination, marks=() if combination in quick else marks) for combination in product(*values)]
