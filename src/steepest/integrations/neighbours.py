"""How weights are stored, by what stands beside them in a model's order: biases, and the matrices that come next.

weight [m, n], then [n]            n outputs, stored inputs first, if all weights of the model have it so
weight [i, o, h, w], then a bias [o]    a transposed convolution
weight [3n, n], then [n, n]        q, k and v in one, then the projection of attention's output
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from steepest.view import View


def is_vector(shape: tuple[int, ...]) -> bool:
    """Return whether at most one dimension is longer than 1."""
    return sum(size != 1 for size in shape) < 2


def views(shapes: Sequence[tuple[int, ...]]) -> list[View]:
    """Return how each of a model's parameters, in the model's order, is seen if it is one matrix, or a fused one.

    >>> mlp, attention = [(24, 8), (24,), (8, 24), (8,)], [(24, 8), (24,), (8, 8), (8,)]
    >>> [view.split for view in views(attention)[::2]], [view.split for view in views(mlp)[::2]]
    ([(8, 8, 8), ()], [(), ()])
    >>> [view.transpose for view in views([(8, 24), (24,), (24, 8), (8,)])[::2]]
    [True, True]
    >>> views([(32, 16, 2, 2), (16,)])[0].pieces
    [(1, 64, 32)]
    """
    inputs_first = _inputs_first(shapes)
    found = [
        View(shape, transpose=inputs_first if len(shape) == 2 else _is_transposed_convolution(shapes, i))
        if not is_vector(shape)
        else View(shape)
        for i, shape in enumerate(shapes)
    ]
    matrices = [i for i, shape in enumerate(shapes) if not is_vector(shape) and 0 not in shape]
    for i, after in pairwise(matrices):
        _, rows, columns = found[i].pieces[0]
        is_flat = math.prod(shapes[i][2:]) == 1 and not (found[i].transpose and len(shapes[i]) > 2)
        if is_flat and rows == 3 * columns and found[after].pieces[0][1:] == (columns, columns):
            found[i] = View(shapes[i], transpose=found[i].transpose, split=(columns,) * 3)
    return found


def _inputs_first(shapes: Sequence[tuple[int, ...]]) -> bool:
    """Return whether biases are as long as their weights are wide, in every layer that tells.

    A norm after a weight may be as long as it is wide, but none is after one that is wider than long.
    """
    sides = [
        (weight.index(bias[0]), weight[1] > weight[0])
        for weight, bias in pairwise(shapes)
        if len(weight) == 2 and len(bias) == 1 and weight[0] != weight[1] and bias[0] in weight and 1 not in weight
    ]
    return all(side for side, _ in sides) and any(is_wide for _, is_wide in sides)


def _is_transposed_convolution(shapes: Sequence[tuple[int, ...]], i: int) -> bool:
    """Return whether a bias as long as the second dimension follows; norms have two vectors, so only one is odd."""
    shape = shapes[i]
    if len(shape) not in (3, 4, 5) or shape[0] == shape[1] or shape[1] == 1:
        return False
    following = 0
    while i + 1 + following < len(shapes) and shapes[i + 1 + following] == (shape[1],):
        following += 1
    return following % 2 == 1
