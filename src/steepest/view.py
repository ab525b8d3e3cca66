"""How a parameter is seen as matrices.

A view turns a tensor of a parameter's shape into a list of batches ``[b, m, n]``, rows being outputs, and back. It is a
list because blocks of a fused projection may differ in shape. Options of a parameter group choose the view:

==============  ========================================================================================
``merge_dims``  True: a convolution ``[o, i, h, w]`` is one matrix ``[o, i·h·w]``; False: leading dimensions
                are a batch, ``[E, m, n]`` is E matrices (stacked experts)
``transpose``   the parameter is stored ``[inputs, outputs]``
``split``       row counts of blocks that are matrices of their own, as in a fused query-key-value projection
``heads``       each block's rows are that many matrices, one per attention head
``block_size``  no matrix is longer or wider: larger ones are cut into blocks of nearly equal size; 0: none is cut
==============  ========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {"merge_dims": True, "transpose": False, "split": (), "heads": 1}


@dataclass(frozen=True)
class View:
    """A parameter's shape and how it is cut into pieces, each a batch of matrices.

    Example:
        >>> view = View((6, 4), split=(4, 1, 1))
        >>> view.pieces
        [(1, 4, 4), (1, 1, 4), (1, 1, 4)]
        >>> x = torch.arange(24.0).reshape(6, 4)
        >>> view.matrices(x, piece=2)
        tensor([[[20., 21., 22., 23.]]])
    """

    shape: tuple[int, ...]
    merge_dims: bool = True
    transpose: bool = False
    split: tuple[int, ...] = ()
    heads: int = 1
    block_size: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 0:
            raise ValueError(f"block_size={self.block_size!r}: must be an integer >= 0; 0 cuts nothing")
        if self.block_size and self.heads > 1:
            raise ValueError(
                f"block_size={self.block_size!r} with heads={self.heads!r}: must be 0: heads are small already"
            )
        if len(self.shape) < 2 and (self.split or self.heads != 1 or self.transpose):
            raise ValueError(f"a parameter of shape {list(self.shape)} has no rows to split, no heads, no transpose")
        if self.split and self.transpose and len(self.shape) > 2 and self.merge_dims:
            raise ValueError(f"split={self.split!r} with transpose=True: the rows of merged dimensions can't be split")
        rows = self.stored[2] if self.transpose else self.stored[1]
        if self.split and (min(self.split) < 1 or sum(self.split) != rows):
            raise ValueError(f"split={self.split!r}: must be positive row counts that add up to {rows}")
        for block in self.split or (rows,):
            if self.heads < 1 or block % self.heads:
                raise ValueError(f"heads={self.heads!r}: must divide the {block} rows of a block")

    @classmethod
    def of(cls, p: Tensor, group: Mapping[str, Any]) -> View:
        """The view of parameter ``p`` that its group's options describe; vectors and scalars ignore them."""
        if p.dim() < 2:
            return cls(tuple(p.shape))
        view = cls(
            tuple(p.shape),
            group["merge_dims"],
            group["transpose"],
            tuple(group["split"]),
            group["heads"],
            group["block_size"],
        )
        if p.dim() > 2 and view.merge_dims and len(view.blocks) > 1 and not p.is_contiguous():
            raise ValueError(
                f"block_size={view.block_size!r}: a parameter of shape {list(p.shape)} whose dimensions merge must be "
                "contiguous to be cut; call contiguous() on it, or leave block_size at 0"
            )
        return view

    @cached_property
    def stored(self) -> tuple[int, int, int]:
        """The parameter as a batch of matrices as it lies in memory, before transposing."""
        if len(self.shape) < 2:
            return 1, 1, math.prod(self.shape)
        if len(self.shape) > 2 and not self.merge_dims:
            return math.prod(self.shape[:-2]), self.shape[-2], self.shape[-1]
        return 1, self.shape[0], math.prod(self.shape[1:])

    @property
    def batched(self) -> bool:
        """Whether a piece may hold several matrices, so that its state keeps a leading dimension."""
        return self.heads > 1 or (len(self.shape) > 2 and not self.merge_dims)

    @cached_property
    def blocks(self) -> list[tuple[slice, slice]]:
        """The rows and columns of each piece, rows being outputs."""
        _, m, n = self.stored
        if self.transpose:
            m, n = n, m
        rows = [cut for start, stop in _bounds(self.split or (m,)) for cut in _cuts(start, stop, self.block_size)]
        return [(r, c) for r in rows for c in _cuts(0, n, self.block_size)]

    @cached_property
    def pieces(self) -> list[tuple[int, int, int]]:
        """The shapes ``(b, m, n)`` of the batches, rows being outputs; none for an empty parameter.

        >>> View((8, 3, 5, 5)).pieces, View((8, 64, 32), merge_dims=False).pieces, View((7,)).pieces
        ([(1, 8, 75)], [(8, 64, 32)], [(1, 1, 7)])
        >>> View((8, 6), block_size=4).pieces
        [(1, 4, 3), (1, 4, 3), (1, 4, 3), (1, 4, 3)]
        """
        if 0 in self.shape:
            return []
        b, h = self.stored[0], self.heads
        return [(b * h, (r.stop - r.start) // h, c.stop - c.start) for r, c in self.blocks]

    def box(self, piece: int) -> tuple[slice, ...] | None:
        """Where in the parameter's own dimensions a piece lies; None if that is no box, as of merged columns.

        >>> View((6, 4), split=(4, 2)).box(1), View((6, 2, 2), block_size=3).box(0)
        ((slice(4, 6, None), slice(0, 4, None)), None)
        """
        if len(self.shape) < 2 or len(self.blocks) == 1:
            return tuple(slice(0, length) for length in self.shape)
        rows, columns = self.blocks[piece]
        if self.transpose:
            rows, columns = columns, rows
        if len(self.shape) == 2 or not self.merge_dims:
            return (*(slice(0, length) for length in self.shape[:-2]), rows, columns)
        every = slice(0, self.stored[2])
        return (rows, *(slice(0, length) for length in self.shape[1:])) if columns == every else None

    def window(self, x: Tensor, piece: int) -> Tensor:
        """The part of ``x``, of the parameter's shape, that a piece covers: always a view, whatever x's layout."""
        if len(self.blocks) == 1:
            return x
        box = self.box(piece)
        if box is not None:
            return x[box]
        rows, columns = self.blocks[piece]
        return x.view(self.stored[1:])[(columns, rows) if self.transpose else (rows, columns)]

    def matrices(self, x: Tensor, piece: int) -> Tensor:
        """A piece of ``x``, of the parameter's shape, as ``[b, m, n]``; without a copy where its layout allows."""
        return self.batch(self.window(x, piece), piece)

    def batch(self, part: Tensor, piece: int) -> Tensor:
        """The `window` of a piece as matrices ``[b, m, n]``; without a copy where its layout allows."""
        b, m, n = self.pieces[piece]
        if self.transpose:
            part = part.reshape(self.stored[0], n, -1).mT
        return part.reshape(b, m, n)

    def shaped(self, D: Tensor, piece: int) -> Tensor:
        """The inverse of `matrices`: ``D [b, m, n]`` in the shape of the piece's `window`."""
        if self.transpose:
            D = D.reshape(self.stored[0], -1, D.shape[-1]).mT
        return D.reshape(self._windows[piece])

    @cached_property
    def _windows(self) -> list[torch.Size]:
        """The shape of each piece's window."""
        whole = torch.empty(self.shape, device="meta")
        return [self.window(whole, piece).shape for piece in range(len(self.pieces))]


def _bounds(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where blocks of these lengths, one after the other, start and stop."""
    stops = list(accumulate(lengths))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _cuts(start: int, stop: int, longest: int) -> list[slice]:
    """``start:stop`` in as few slices of nearly equal length as ``longest`` allows; 0 allows any."""
    length = stop - start
    parts = -(-length // longest) if longest and length else 1
    edges = [start + length * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
