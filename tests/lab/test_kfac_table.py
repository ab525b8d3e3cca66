"""The table of K-FAC's costs in the documentation says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "benchmarks/results/kfac.json").read_text())["milliseconds"]
ROWS = {
    "K-FAC": ("KFAC 1/1", "KFAC 1/10", "KFAC 10/100"),
    'K-FAC, `form="eigen"`': ("KFAC eigen 1/1", "KFAC eigen 1/10", "KFAC eigen 10/100"),
    "EKFAC": ("EKFAC 1/1", "EKFAC 1/10", "EKFAC 10/100"),
    "ASDL's K-FAC": ("ASDL KFAC 1/1", "ASDL KFAC 1/10", "ASDL KFAC 10/100"),
    "SOAP, f = 1, 10, 100": ("SOAP 1", "SOAP 10", "SOAP 100"),
}


@pytest.mark.parametrize("title", ROWS)
def test_the_page_has_the_overheads_that_were_measured(title) -> None:
    found = [MEASURED[net][name] / MEASURED[net]["SGD"] - 1 for net in ("MLP", "CNN") for name in ROWS[title]]
    row = f"| {title} | {' | '.join(f'{x:.2f}' for x in found)} |"
    assert row in (ROOT / "docs/second-order.md").read_text()
