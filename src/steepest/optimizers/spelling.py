"""What every optimizer's signature shares, and how freely names may be spelled."""

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


def spelled(name: str, known: Iterable[str]) -> str | None:
    """Which of the ``known`` names is meant, whatever its case, hyphens, underscores and blanks; None if none is.

    >>> spelled("KL_Soap", ["soap", "kl-soap"]), spelled("soup", ["soap"])
    ('kl-soap', None)
    """
    return next((other for other in known if _bare(other) == _bare(name)), None)


def _bare(name: str) -> str:
    return name.lower().translate(str.maketrans("", "", "-_ "))
