"""The table of docs/memory.md has the bytes that optimizers hold, counted on their state."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import steepest

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
ROWS = re.findall(r"^\| `(\w+)` \| (?:`(.*)`)? ?\| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
WITH_A_MODEL = {"kfac", "ekfac"}
"""Their state depends on a model's layers, not on a weight's shape alone."""


def test_the_table_has_every_optimizer() -> None:
    assert {name for name, *_ in ROWS} == {name.replace("-", "_") for name in steepest.optimizers.NAMES} - WITH_A_MODEL


@pytest.mark.parametrize(("name", "words", "square", "wide"), ROWS)
def test_bytes_are_counted(name: str, words: str, square: str, wide: str) -> None:
    pairs = (word.split("=") for word in words.split(", ") if word)
    options = {option: ast.literal_eval(value) for option, value in pairs}
    for shape, expected in (((256, 256), square), ((256, 1024), wide)):
        W = torch.nn.Parameter(torch.zeros(shape))
        optimizer = steepest.create(name, [W], lr=0.1, **options)
        W.grad = torch.eye(*shape)
        optimizer.step()
        counted = sum(x.nbytes for x in optimizer.state[W].values())
        assert f"{counted / W.numel():.2f}" == expected, f"{name} {words} {shape}"
