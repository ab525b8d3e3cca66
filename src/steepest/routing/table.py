"""A routing as a table: for a person to read, and for an optimizer to take its groups from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steepest.engine.group import OPTIONS as SHARED
from steepest.engine.group import option_defaults
from steepest.rule import nearest
from steepest.view import OPTIONS, View

TITLES = ("parameter", "shape", "view", "rule", "why", "state")
INDEX = re.compile(r"(?<![^._])\d+(?![^.])")
"""A number in a parameter's name: ``h.7.attn``, ``expert_7``."""


@dataclass(frozen=True, eq=False)
class Row:
    """What happens to one parameter, and why."""

    name: str
    param: Tensor
    rule: str
    """The rule that steps it."""
    view: View | None
    """How it is seen as matrices; None where a rule works entry by entry."""
    why: str
    state_bytes: int
    """What the rule keeps for it, with the rule's default options."""
    hidden: bool = True
    """Whether it counts as a hidden matrix, no embedding, head, norm or vector."""
    decays: bool = True
    """Whether weight decay applies: vectors, norms and biases are exempt."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What an override set for this parameter alone."""
    seen: str = "–"
    """The view in words."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.param.shape)


@dataclass(frozen=True, eq=False)
class Routing:
    """Every trainable parameter's rule, view and reason; ``print`` it before a training."""

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    """What looks wrong."""
    rule: str
    """The rule for hidden matrices."""
    elementwise: str
    """The rule for the rest."""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of the parameter of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [TITLES, *map(_cells, _folded(self.rows))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join([cell.ljust(width) for cell, width in zip(line, widths, strict=True)]).rstrip() for line in lines
        ]
        return "\n".join([*table, "", *self._totals(), *(f"warning: {text}" for text in self.warnings)])

    def groups(
        self,
        options: Mapping[str, Any] | None = None,
        elementwise: Mapping[str, Any] | None = None,
        *,
        decay_1d: bool = False,
    ) -> list[dict[str, Any]]:
        """Parameter groups for `steepest.Optimizer`: parameters with the same rule, view and options stand together.

        Groups of the matrix rule come first, so ``param_groups[0]["lr"]`` is the rate that ``options`` name.

        Args:
            options: For the parameters of this routing's ``rule``. Other rules take from them what every rule
                has (learning rate, weight decay).
            elementwise: For what is no hidden matrix; goes before what ``options`` say.
            decay_1d: Whether vectors, norms and biases decay as well. They don't by default, as in nanoGPT and in the
                Trainer of transformers: decay would pull a norm's scale to 0. Embeddings and heads do decay.

        Example:
            >>> from steepest.routing import route
            >>> from torch import nn
            >>> routing = route(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
            >>> for group in routing.groups({"lr": 3e-3, "weight_decay": 0.1}, {"lr": 1e-3}):
            ...     print([name for name, _ in group["params"]], group["rule"], group["lr"], group["weight_decay"])
            ['0.weight'] soap 0.003 0.1
            ['0.bias', '2.bias'] adamw 0.001 0.0
            ['2.weight'] adamw 0.001 0.1
        """
        options, elementwise = dict(options or {}), dict(elementwise or {})
        if misplaced := [name for name in OPTIONS if name in options]:
            raise ValueError(
                f"{misplaced[0]}={options[misplaced[0]]!r}: routing chooses views for each parameter; to choose one "
                f"yourself, use overrides={{pattern: {{{misplaced[0]!r}: ...}}}}"
            )
        groups: list[tuple[dict[str, Any], list[tuple[str, Tensor]]]] = []
        for row in sorted(self.rows, key=lambda row: row.view is None):
            settings = self._settings(row, options, elementwise, decay_1d)
            members = next((members for known, members in groups if known == settings), None)
            if members is None:
                groups.append((settings, members := []))
            members.append((row.name, row.param))
        return [{"params": members, **settings} for settings, members in groups]

    def _settings(
        self, row: Row, options: Mapping[str, Any], elementwise: Mapping[str, Any], decay_1d: bool
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {"rule": row.rule}
        if row.view is not None:
            settings |= {name: getattr(row.view, name) for name in OPTIONS}
        settings |= options if row.rule == self.rule else {name: options[name] for name in SHARED if name in options}
        if row.rule == self.elementwise and not row.hidden:
            settings |= elementwise
        if not (row.decays or decay_1d):
            settings["weight_decay"] = 0.0
        settings |= row.options
        known = option_defaults(row.rule)
        for name in settings:
            if name not in known:
                raise ValueError(f"{name}={settings[name]!r}: {row.rule} has no such option{nearest(name, known)}")
        return settings

    def _totals(self) -> list[str]:
        lines = []
        total = sum(row.param.numel() for row in self.rows)
        for rule in dict.fromkeys(row.rule for row in sorted(self.rows, key=lambda row: row.view is None)):
            rows = [row for row in self.rows if row.rule == rule]
            entries = sum(row.param.numel() for row in rows)
            share = f"{entries / total:.1%}" if total else "0%"
            state = _bytes(sum(row.state_bytes for row in rows))
            lines.append(f"{rule}: {len(rows)} parameters, {_count(entries)} entries ({share}), state {state}")
        return lines


def _folded(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ only in the indices in their names, as the layers of a model do, together."""
    folded: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = INDEX.sub("#", row.name)
        key = (pattern, row.shape, row.seen, row.rule, row.why, repr(row.options))
        folded.setdefault(key, []).append(row)
    return list(folded.values())


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    first = rows[0]
    indices = zip(*(INDEX.findall(row.name) for row in rows), strict=True)
    ranges = iter([_range(list(dict.fromkeys(column))) for column in indices])
    name = INDEX.sub(lambda _: next(ranges), first.name)
    if len(rows) > 1:
        name += f" ×{len(rows)}"
    shape = "×".join(map(str, first.shape)) or "scalar"
    return name, shape, first.seen, first.rule, first.why, _bytes(sum(row.state_bytes for row in rows))


def _range(parts: Sequence[str]) -> str:
    """An index in the name of folded rows.

    >>> _range(["7"]), _range(["0", "1", "2"]), _range(["2", "4"])
    ('7', '{0..2}', '{2,4}')
    """
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(map(int, parts))
    contiguous = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if contiguous else "{" + ",".join(map(str, numbers)) + "}"


def _bytes(count: int) -> str:
    """A number of bytes for reading.

    >>> _bytes(512), _bytes(65_536), _bytes(3_000_000_000)
    ('512 B', '65.5 kB', '3.0 GB')
    """
    return f"{count} B" if count < 1000 else _count(count, ("kB", "MB", "GB", "TB"))


def _count(count: float, units: Sequence[str] = ("k", "M", "G", "T")) -> str:
    if count < 1000:
        return str(count)
    power = min(int(math.log10(count) / 3 + 1e-4), len(units))
    separator = " " if len(units[0]) > 1 else ""
    return f"{count / 1000**power:.1f}{separator}{units[power - 1]}"
