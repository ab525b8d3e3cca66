"""Routing where nothing is known but shapes: a host that hands over parameters, without names and without the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from steepest.integrations.neighbours import is_vector, views
from steepest.optimizers.tables import PAIR, lora_pairs, tables
from steepest.routing.classify import state_bytes
from steepest.routing.layout import Layout
from steepest.routing.table import Row
from steepest.rules import RULES
from steepest.view import View

SHORTEST = 32
"""The third dimension of stacked experts is at least as long; that of a kernel of one dimension is shorter."""


@dataclass(frozen=True)
class Guess:
    """What a parameter is taken for, and why; it is stepped entry by entry if it has no layout."""

    why: str
    layout: Layout | None = None
    rank: int | None = None
    """The rank of a LoRA factor."""
    doubtful: bool = False
    decays: bool = True


def guess(shapes: Sequence[tuple[int, ...]], entrywise: Collection[int] = ()) -> list[Guess]:
    """Return what the parameters of one model are taken for, in the model's order; ``entrywise`` are no matrices.

    >>> for found in guess([(50257, 768), (768,), (64, 3, 7, 7), (8, 128, 64), (768, 768), (10, 768)]):
    ...     print(found.layout, "|", found.why)
    None | table of a vocabulary's size
    None | vector
    64×(3·7·7) | convolution, flattened
    8 experts of 128×64 | stacked matrices: experts?
    768×768 | matrix
    None | output head? the last matrix
    """
    is_table, is_lora, counts = tables(shapes), lora_pairs(shapes), Counter(shapes)
    entry = next((i for i, shape in enumerate(shapes) if not is_vector(shape)), None)
    guesses = [
        Guess("no matrix, as its group says")
        if i in entrywise
        else _lora(shape)
        if is_lora[i]
        else Guess("table of a vocabulary's size")
        if is_table[i]
        else _by_dimensions(shape, view, is_first=i == entry)
        for i, (shape, view) in enumerate(zip(shapes, views(shapes), strict=True))
    ]
    for i in range(1, len(shapes)):
        beside = "table" in guesses[i - 1].why and shapes[i - 1][1:] == shapes[i][1:]
        if beside and counts[shapes[i]] == 1 and len(shapes[i]) == 2:
            guesses[i] = Guess("table beside one of a vocabulary's size")
    experts = {(shape[0], size) for shape in shapes if _are_experts(shape) for size in shape[1:]}
    for i in range(len(shapes)):
        if shapes[i] in experts:
            guesses[i] = Guess("router: a row for each expert", doubtful=True)
    matrices = [i for i, found in enumerate(guesses) if found.layout is not None]
    lasting = [i for i, shape in enumerate(shapes) if not is_vector(shape)]
    if len(matrices) > 1 and matrices[-1] == lasting[-1] and not is_lora[matrices[-1]]:
        first, last = matrices[0], matrices[-1]
        shape, is_pair = shapes[last], shapes[first] == shapes[last] and len(matrices) > PAIR and not any(is_table)
        if counts[shape] == 1 and (len(shape) == 2 or _narrows(shape)):
            guesses[last] = Guess("output head? the last matrix", doubtful=True)
        elif len(shape) == 2 and counts[shape] == PAIR and is_pair and shape[0] > shape[1]:
            guesses[first] = Guess("embedding? as the last matrix, and no other", doubtful=True)
            guesses[last] = Guess("output head? as the first matrix, and no other", doubtful=True)
    return guesses


def rows(
    params: Sequence[Tensor], names: Sequence[str], rule: str, elementwise: str, entrywise: Collection[int]
) -> tuple[list[Row], list[str]]:
    """Return the rows of a routing by shapes, and the names of what could only be guessed.

    ``entrywise`` are the positions of what is no matrix.
    """
    found = guess([tuple(p.shape) for p in params], entrywise)
    if rule == elementwise:
        found = [replace(each, layout=None, doubtful=False) for each in found]
    made = [_row(p, name, each, rule, elementwise) for p, name, each in zip(params, names, found, strict=True)]
    return made, [name for name, each in zip(names, found, strict=True) if each.doubtful]


def _lora(shape: tuple[int, ...]) -> Guess:
    view = View(shape)
    rank = min(view.pieces[0][1:])
    return Guess(f"LoRA factor of rank {rank}", Layout(view), rank)


def _narrows(shape: tuple[int, ...]) -> bool:
    """Return whether it is a convolution to few channels, as the last one of a network that makes images is."""
    return len(shape) > 2 and not _are_experts(shape) and 2 * shape[0] <= shape[1]


def _are_experts(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= SHORTEST


def _by_dimensions(shape: tuple[int, ...], view: View, is_first: bool) -> Guess:
    """Return what the number of dimensions tells; ``view`` is that of a layer of this shape."""
    if is_vector(shape):
        return Guess("vector", decays=False)
    if 0 in shape:
        return Guess("placeholder without its shape")
    if len(shape) == 2:
        return _matrix(view, "matrix")
    if shape[0] == 1:
        return Guess("learnt table: added, not multiplied")
    if _are_experts(shape):
        experts = Layout(View(shape, merge_dims=False), members="experts")
        return Guess("stacked matrices: experts?", experts, doubtful=True)
    if len(shape) > 5:
        return Guess(f"{len(shape)} dimensions: nothing says it is a matrix", doubtful=True)
    if shape[1] == 1 and not is_first:  # the first reads an image of one channel
        return Guess("depthwise convolution: one filter per channel")
    return _matrix(view, f"{'transposed ' * view.transpose}convolution, flattened")


def _matrix(view: View, why: str) -> Guess:
    return Guess("fused: q, k, v?", Layout(view, blocks="q, k, v")) if view.split else Guess(why, Layout(view))


def _row(p: Tensor, name: str, found: Guess, rule: str, elementwise: str) -> Row:
    layout = found.layout
    goes = elementwise if layout is None else rule
    has_bases = "max_precond_dim" in RULES[goes].defaults()
    rank = found.rank if has_bases else None
    pieces = layout.view.pieces if layout else [(1, 1, p.numel())]
    return Row(
        name=name,
        param=p,
        rule=goes,
        view=layout.view if layout else None,
        layout=str(layout) if layout else "×".join(map(str, p.shape)) or "scalar",
        why=f"{found.why}, without a basis of its long side" if rank else found.why,
        state_bytes=sum(state_bytes(goes, piece, rank) for piece in pieces),
        hidden=layout is not None,
        decays=found.decays,
        options={},
        longest_basis=rank,
    )
