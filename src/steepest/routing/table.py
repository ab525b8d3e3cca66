"""The result of routing: a table to read, which an optimizer takes its parameter groups from."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steepest.engine.group import OPTIONS as SHARED
from steepest.engine.group import option_defaults
from steepest.rule import nearest
from steepest.view import OPTIONS, View

TITLES = ("parameter", "shape", "rule", "state", "why")
WIDTH, NARROWEST = 80, 22
"""Characters of a printed line, and of its last column at least."""
INDEX = re.compile(r"(?<![^._])\d+(?![^.])")
"""A number in a parameter's name: ``h.7.attn``, ``expert_7``."""


@dataclass(frozen=True, eq=False)
class Row:
    """A row tells how one parameter is optimized, and why."""

    name: str
    param: Tensor
    rule: str
    """The rule that optimizes it."""
    view: View | None
    """The matrices that it is taken as; None if the rule is elementwise."""
    layout: str
    """These matrices in words; the shape if the rule is elementwise."""
    why: str
    state_bytes: int
    """The size of its state under the rule's default options."""
    hidden: bool
    """Whether it is a hidden matrix: no embedding, head, norm or vector."""
    decays: bool
    """Whether weight decay applies: vectors, norms and biases are exempt."""
    options: Mapping[str, Any]
    """The options that overrides set for it."""
    longest_basis: int | None = None
    """The longest side that has a basis, where that is shorter than the rule's default."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self.param.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """A routing tells the rule, the matrices and the reason for every trainable parameter of a model.

    Print it before a training. Notebooks show it as a table.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    """What looks wrong."""
    rule: str
    """The rule of hidden matrices."""
    elementwise: str
    """The rule of all other parameters."""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """Return the row of the parameter of this name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __repr__(self) -> str:
        lines = [TITLES, *map(_cells, fold(self.rows))]
        *widths, _ = [max(map(len, column)) for column in zip(*lines, strict=True)]
        indent = sum(widths) + 2 * len(widths)
        text = []
        for *cells, why in lines:
            start = "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=True))
            first, *rest = textwrap.wrap(why, max(WIDTH - indent, NARROWEST))
            text += [start + first, *(" " * indent + more for more in rest)]
        return "\n".join([*text, "", *self._notes()])

    def _repr_html_(self) -> str:
        """Return the table as HTML, which notebooks show."""
        lines = [("th", TITLES), *(("td", _cells(rows)) for rows in fold(self.rows))]
        table = "".join(
            "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>" for tag, cells in lines
        )
        return f"<table>{table}</table><p>{'<br>'.join(map(html.escape, self._notes()))}</p>"

    def groups(
        self,
        options: Mapping[str, Any] | None = None,
        elementwise: Mapping[str, Any] | None = None,
        *,
        decay_1d: bool = False,
    ) -> list[dict[str, Any]]:
        """Return parameter groups for `steepest.Optimizer`, one for each combination of rule, view and options.

        Groups of matrices come first, so ``param_groups[0]["lr"]`` is the learning rate in ``options``.

        Args:
            options: Options of this routing's ``rule``. Other rules take from them what every rule has, such as the
                learning rate and weight decay.
            elementwise: Options of all parameters but hidden matrices; they take precedence over ``options``.
            decay_1d: Whether weight decay acts on vectors, norms and biases too. By default it doesn't, as in nanoGPT
                and in the Trainer of transformers, since decay would pull a norm's scale to 0. It does act on
                embeddings and heads.

        Raises:
            ValueError: If an option is unknown, or chooses a view for all parameters at once.

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
        _refuse_unknown(options, self.rule, self.elementwise, "it belongs into elementwise={...}")
        _refuse_unknown(elementwise, self.elementwise, self.rule, "it doesn't belong into elementwise={...}")
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
            settings |= {"bias": True} if row.view.bias else {}
        settings |= options if row.rule == self.rule else {name: options[name] for name in SHARED if name in options}
        if row.rule == self.elementwise and not row.hidden:
            settings |= elementwise
        if not (row.decays or decay_1d):
            settings["weight_decay"] = 0.0
        if row.longest_basis is not None:
            settings["max_precond_dim"] = min(row.longest_basis, settings.get("max_precond_dim", row.longest_basis))
        settings |= row.options
        _refuse_unknown(settings, row.rule)
        return settings

    def _notes(self) -> list[str]:
        """Return a line of totals for each rule, and the warnings."""
        notes = []
        total = sum(row.param.numel() for row in self.rows)
        for rule in dict.fromkeys(row.rule for row in sorted(self.rows, key=lambda row: row.view is None)):
            rows = [row for row in self.rows if row.rule == rule]
            entries = sum(row.param.numel() for row in rows)
            share = f"{entries / total:.1%}" if total else "0%"
            state = _bytes(sum(row.state_bytes for row in rows))
            notes.append(f"{rule}: {len(rows)} parameters, {_count(entries)} entries ({share}), state {state}")
        return notes + [f"warning: {text}" for text in self.warnings]


def _refuse_unknown(options: Mapping[str, Any], rule: str, other: str = "", remedy: str = "") -> None:
    """Raise a ValueError for an option that a rule doesn't have, with the remedy if the other rule has it."""
    known = option_defaults(rule)
    for name in options:
        if name not in known:
            misplaced = other and name in option_defaults(other)
            hint = f", but {other} has: {remedy}" if misplaced else nearest(name, known)
            raise ValueError(f"{name}={options[name]!r}: {rule} has no such option{hint}")


def fold(rows: Sequence[Row]) -> list[list[Row]]:
    """Return rows in lists of those that differ only in the indices in their names, as a model's layers do."""
    folded: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        pattern = INDEX.sub("#", row.name)
        key = (pattern, row.shape, row.layout, row.rule, row.why, repr(row.options))
        folded.setdefault(key, []).append(row)
    return list(folded.values())


def common_name(names: Sequence[str]) -> str:
    """Return one name for names that differ only in their indices.

    >>> common_name(["h.0.w", "h.1.w", "h.2.w"]), common_name(["h.2.w", "h.4.w"]), common_name(["h.0.w"])
    ('h.{0..2}.w ×3', 'h.{2,4}.w ×2', 'h.0.w')
    """
    columns = iter(zip(*(INDEX.findall(name) for name in names), strict=True))
    name = INDEX.sub(lambda _: _range(sorted({int(index) for index in next(columns)})), names[0])
    return f"{name} ×{len(names)}" if len(names) > 1 else name


def _range(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return str(indices[0])
    contiguous = len(indices) == indices[-1] - indices[0] + 1
    return f"{{{indices[0]}..{indices[-1]}}}" if contiguous else "{" + ",".join(map(str, indices)) + "}"


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    name, first = common_name([row.name for row in rows]), rows[0]
    return name, first.layout, first.rule, _bytes(sum(row.state_bytes for row in rows)), first.why


def _bytes(count: int) -> str:
    """Return a number of bytes with its unit.

    >>> _bytes(512), _bytes(65_536), _bytes(3_000_000_000)
    ('512 B', '65.5 kB', '3.0 GB')
    """
    return f"{count} B" if count < 1000 else _count(count, (" kB", " MB", " GB", " TB"))


def _count(count: int, units: Sequence[str] = ("k", "M", "G", "T")) -> str:
    if count < 1000:
        return str(count)
    power = min(int(math.log10(count) / 3 + 1e-4), len(units))
    return f"{count / 1000**power:.1f}{units[power - 1]}"
