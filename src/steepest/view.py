"""How a parameter is seen as matrices.

A view turns a tensor of a parameter's shape into a list of batches ``[b, m, n]`` whose rows are outputs, and back. The
batches are called pieces; there may be several, because the blocks of a fused projection may differ in shape. Options
of a parameter group choose the view:

==============  ========================================================================================
``merge_dims``  True: a convolution ``[o, i, h, w]`` is one matrix ``[o, i·h·w]``; False: leading dimensions
                are a batch, ``[E, m, n]`` is E matrices (stacked experts)
``transpose``   the parameter is stored ``[inputs, outputs]``
``split``       row counts of blocks that are matrices of their own, as in a fused query-key-value projection
``heads``       each block's rows are that many matrices, one per attention head; a tuple has a number for each block
                of ``split``, as grouped-query attention needs: (8, 2, 2)
``block_size``  no matrix is longer or wider: larger ones are cut into blocks of nearly equal size; 0: none is cut
==============  ========================================================================================

K-FAC sees a layer's weight and bias as one matrix, whose last column is the bias: ``bias``.
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
    """A view says how a parameter of one shape is cut into pieces, each of which is a batch of matrices.

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
    heads: int | tuple[int, ...] = 1
    block_size: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.heads, tuple) and (not self.heads or len(self.heads) != len(self.split)):
            raise ValueError(
                f"heads={self.heads!r}: must be one number, or one for each of the {len(self.split)} blocks of split"
            )
        if not isinstance(self.block_size, int) or self.block_size < 0:
            raise ValueError(f"block_size={self.block_size!r}: must be an integer >= 0; 0 cuts nothing")
        if self.block_size and self.has_heads:
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
        if self.bias and (len(self.shape) < 2 or self.stored[0] != 1):
            raise ValueError(f"bias=True: a parameter of shape {list(self.shape)} is no layer's one matrix")
        for block, heads in zip(self.split or (rows,), self._heads, strict=True):
            if heads < 1 or block % heads:
                raise ValueError(f"heads={self.heads!r}: must divide the {block} rows of a block")

    @classmethod
    def of(cls, p: Tensor, group: Mapping[str, Any]) -> View:
        """Return the view of ``p`` that the options of its group describe; vectors and scalars ignore the options."""
        if p.dim() < 2:
            return cls(tuple(p.shape))
        view = cls(
            tuple(p.shape),
            group["merge_dims"],
            group["transpose"],
            tuple(group["split"]),
            group["heads"],
            group["block_size"],
            group.get("bias", False),
        )
        if p.dim() > 2 and view.merge_dims and len(view.blocks) > 1 and not p.is_contiguous():
            raise ValueError(
                f"block_size={view.block_size!r}: a parameter of shape {list(p.shape)} whose dimensions merge must be "
                "contiguous to be cut; call contiguous() on it, or leave block_size at 0"
            )
        return view

    @cached_property
    def stored(self) -> tuple[int, int, int]:
        """Return the parameter's shape as a batch of matrices as it lies in memory, before it is transposed."""
        if len(self.shape) < 2:
            return 1, 1, math.prod(self.shape)
        if len(self.shape) > 2 and not self.merge_dims:
            return math.prod(self.shape[:-2]), self.shape[-2], self.shape[-1]
        return 1, self.shape[0], math.prod(self.shape[1:])

    @property
    def batched(self) -> bool:
        """Return whether a piece may hold several matrices, so that its state keeps a leading dimension."""
        return self.has_heads or (len(self.shape) > 2 and not self.merge_dims)

    @property
    def has_heads(self) -> bool:
        """Return whether a block's rows may be several matrices."""
        return max(self._heads) > 1

    @property
    def _heads(self) -> tuple[int, ...]:
        """Return the number of heads of each block of the split."""
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * max(len(self.split), 1)

    @cached_property
    def blocks(self) -> list[tuple[slice, slice]]:
        """Return the rows and columns of each piece, where rows are outputs."""
        _, m, n = self.stored
        if self.transpose:
            m, n = n, m
        rows = [cut for start, stop in _bounds(self.split or (m,)) for cut in _cuts(start, stop, self.block_size)]
        return [(r, c) for r in rows for c in _cuts(0, n, self.block_size)]

    @cached_property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Return the shape ``(b, m, n)`` of each piece, where rows are outputs; an empty parameter has no pieces.

        >>> View((8, 3, 5, 5)).pieces, View((8, 64, 32), merge_dims=False).pieces, View((7,)).pieces
        ([(1, 8, 75)], [(8, 64, 32)], [(1, 1, 7)])
        >>> View((8, 6), block_size=4).pieces
        [(1, 4, 3), (1, 4, 3), (1, 4, 3), (1, 4, 3)]
        >>> View((48, 32), split=(32, 8, 8), heads=(4, 1, 1)).pieces
        [(4, 8, 32), (1, 8, 32), (1, 8, 32)]
        """
        if 0 in self.shape:
            return []
        b = self.stored[0]
        heads = self._heads if self.has_heads else (1,) * len(self.blocks)
        shapes = [
            (b * h, (r.stop - r.start) // h, c.stop - c.start) for h, (r, c) in zip(heads, self.blocks, strict=True)
        ]
        return [(b, m, n + self.joins(piece)) for piece, (b, m, n) in enumerate(shapes)]

    def joins(self, piece: int) -> bool:
        """Return whether the bias is the last column of a piece: with ``bias``, of those that have the last input."""
        inputs = self.stored[1] if self.transpose else self.stored[2]
        return self.bias and self.blocks[piece][1].stop == inputs

    def joined(self, M: Tensor, bias: Tensor, piece: int) -> Tensor:
        """Return the piece ``M [b, m, n]`` with its part of ``bias``, one entry per output, as one more column.

        >>> View((4, 1), split=(3, 1), bias=True).joined(torch.zeros(1, 3, 1), torch.arange(4.0), piece=0)
        tensor([[[0., 0.],
                 [0., 1.],
                 [0., 2.]]])
        """
        return torch.cat([M, bias[self.blocks[piece][0]].reshape(*M.shape[:-1], 1)], dim=-1)

    def slices(self, piece: int) -> tuple[slice, ...] | None:
        """Return the slices that cut a piece out of the parameter; None if slices can't, as with merged columns.

        >>> View((6, 4), split=(4, 2)).slices(1), View((6, 2, 2), block_size=3).slices(0)
        ((slice(4, 6, None), slice(0, 4, None)), None)
        """
        if len(self.shape) < 2 or len(self.blocks) == 1:
            return tuple(slice(0, length) for length in self.shape)
        rows, columns = self.blocks[piece]
        if self.transpose:
            rows, columns = columns, rows
        if len(self.shape) == 2 or not self.merge_dims:
            return (*(slice(0, length) for length in self.shape[:-2]), rows, columns)
        whole_rows = columns == slice(0, self.stored[2])
        return (rows, *(slice(0, length) for length in self.shape[1:])) if whole_rows else None

    def cut(self, x: Tensor, piece: int) -> Tensor:
        """Cut a piece out of ``x``, which has the parameter's shape; the result is always a view of ``x``."""
        if len(self.blocks) == 1:
            return x
        slices = self.slices(piece)
        if slices is not None:
            return x[slices]
        rows, columns = self.blocks[piece]
        return x.view(self.stored[1:])[(columns, rows) if self.transpose else (rows, columns)]

    def matrices(self, x: Tensor, piece: int) -> Tensor:
        """Return a piece of ``x``, which has the parameter's shape, as ``[b, m, n]``; a view if its layout allows."""
        return self.batch(self.cut(x, piece), piece)

    def batch(self, part: Tensor, piece: int) -> Tensor:
        """Return a piece that has been `cut` out as ``[b, m, n]``; a view where its layout allows."""
        b, m, n = self.pieces[piece]
        n -= self.bias and self.joins(piece)
        if self.transpose:
            part = part.reshape(self.stored[0], n, -1).mT
        return part.reshape(b, m, n)

    def unbatch(self, D: Tensor, piece: int) -> Tensor:
        """Return ``D [b, m, n]`` in the shape that the piece has when it is `cut` out of the parameter."""
        if self.transpose:
            D = D.reshape(self.stored[0], -1, D.shape[-1]).mT
        shape = self._cut_shapes[piece]
        return D if D.shape == shape else D.reshape(shape)

    @cached_property
    def _cut_shapes(self) -> list[torch.Size]:
        """Return the shape of each piece when it is cut out of the parameter."""
        whole = torch.empty(self.shape, device="meta")
        return [self.cut(whole, piece).shape for piece in range(len(self.pieces))]


def _bounds(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return where consecutive blocks of these lengths start and stop."""
    stops = list(accumulate(lengths))
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _cuts(start: int, stop: int, longest: int) -> list[slice]:
    """Cut ``start:stop`` into as few slices of nearly equal length as ``longest`` allows; 0 allows any length."""
    length = stop - start
    parts = -(-length // longest) if longest and length else 1
    edges = [start + length * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
