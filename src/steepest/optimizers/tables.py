"""Tables of a vocabulary's size, which shapes alone give away: embeddings, and heads that score a vocabulary."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from steepest.rule import Rule
from steepest.rules import RULES

ROWS = 8192
"""Fewer rows are no vocabulary's; hidden layers of small models are as long as small vocabularies."""
WIDER, MUCH_WIDER = 3.0, 16.0
"""Rows to columns. Llama 2 70B has 3.9; its feed-forward layers have 3.5, and so their number has to tell."""
PAIR = 2
"""A model has at most one embedding and one head of a shape, and mostly more layers."""
WHOLE = 4
"""From so many parameters on, they are taken for those of a model."""


def tables(shapes: Sequence[tuple[int, ...]]) -> list[bool]:
    """Return which of a model's parameters have the shape of a vocabulary's table ``[rows, columns]``.

    >>> tables([(50257, 768), *[(3072, 768)] * 12, (50257, 768)]).count(True)
    2
    >>> any(tables([(28672, 8192)] * 80))    # feed-forward layers
    False
    """
    counts = Counter(shapes)

    def is_table(shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or shape[0] < ROWS:
            return False
        return shape[0] >= (WIDER if counts[shape] <= PAIR else MUCH_WIDER) * max(shape[1], 1)

    return [is_table(shape) for shape in shapes]


def lora_pairs(shapes: Sequence[tuple[int, ...]]) -> list[bool]:
    """Return which parameters are factors of low-rank adapters: A ``[r, n]``, and right after it B ``[m, r]``.

    They are if three quarters of the matrices stand in such pairs, with r at most a quarter of m and n.

    >>> lora_pairs([(8, 4096), (14336, 8), (8, 64, 3, 3), (128, 8, 1, 1)])
    [True, True, True, True]
    >>> lora_pairs([(50257, 768), (768,), (768, 3072), (50257, 768)])
    [False, False, False, False]
    """
    matrices = [i for i, shape in enumerate(shapes) if sum(size != 1 for size in shape) > 1]
    paired: set[int] = set()
    for i, j in pairwise(matrices):
        A, B = _flat(shapes[i]), _flat(shapes[j])
        if i not in paired and A[0] == B[1] and 4 * A[0] <= min(A[1], B[0]):
            paired |= {i, j}
    if 4 * len(paired) < 3 * len(matrices):
        paired = set()
    return [i in paired for i in range(len(shapes))]


def warn_of_tables(groups: Iterable[Mapping[str, Any]], named: Iterable[bool], stacklevel: int) -> None:
    """Warn if what looks like a whole model's parameters has a vocabulary's table under a matrix rule.

    Args:
        groups: The groups of an optimizer.
        named: For each, whether the caller named its rule, which says that it is meant.
        stacklevel: The frames up to the caller.
    """
    groups = list(groups)
    everything = [(group, p) for group in groups for p in group["params"]]
    if len(everything) < WHOLE:
        return
    shapes = [tuple(p.shape) for _, p in everything]
    meant = {id(group) for group, is_named in zip(groups, named, strict=False) if is_named}
    lora = lora_pairs(shapes)
    found = [
        (group, p)
        for (group, p), is_table, is_lora in zip(everything, tables(shapes), lora, strict=True)
        if is_table and not is_lora and id(group) not in meant and issubclass(RULES[group["rule"]], Rule)
    ]
    if found:
        group, p = found[0]
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"{_name(group, p)}of shape {list(p.shape)}{more} look like an embedding or a head, and go to "
            f"{group['rule']} as matrices, which is known to do harm there: use steepest.for_model(model, ...), or "
            "steepest.integrations.ByShape where only parameters are at hand; what is meant so goes unwarned "
            f'into a group that names its rule: {{"params": [...], "rule": {group["rule"]!r}}}',
            stacklevel=stacklevel + 1,
        )


def _name(group: Mapping[str, Any], p: Tensor) -> str:
    names = group.get("param_names")
    if not names:
        return "parameters "
    return f"{next(name for name, q in zip(names, group['params'], strict=True) if q is p)} "


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a shape whose trailing dimensions merge."""
    rows, *rest = shape
    columns = 1
    for size in rest:
        columns *= size
    return rows, columns
