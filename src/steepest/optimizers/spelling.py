"""What every optimizer's signature shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""Tensors, groups of them with options of their own, or pairs with names."""


def given(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The options among a constructor's local variables.

    >>> given({"self": None, "params": [], "lr": 0.1})
    {'lr': 0.1}
    """
    return {name: value for name, value in scope.items() if name not in ("self", "params", "__class__")}
