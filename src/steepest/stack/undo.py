"""Updates that can be undone, matrix by matrix, without asking a device which of them must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest import kernels

SMALL = 2**20
"""The number of entries below which launches take more of the time than memory does, as `steepest.kernels.Gates` has
it."""


def undoing(finite: Tensor, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Save tensors before an update, and return the function that undoes the update where ``finite`` is False.

    Nothing waits for the device.

    Args:
        finite: B bools on the tensors' device, False for the matrices that must not change.
        tensors: ``[B, ...]`` each, which are restored in place.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> undo = undoing(torch.tensor([True, False]), [x])
        >>> _ = x.add_(5)
        >>> undo()
        >>> x
        tensor([[6.],
                [2.]])
    """
    undos = [_undoing(finite, x) for x in tensors]

    def undo() -> None:
        for undo_one in undos:
            undo_one()

    return undo


def undoing_each(finite: Sequence[Tensor], tensors: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    """Save lists of tensors, each with a mask of its own, and return the function that undoes an update of them.

    Small tensors are saved and restored together, in a few operations whatever their number.

    Args:
        finite: for each list a bool on its device, False if its tensors must not change.
        tensors: lists of tensors of any shape, which are restored in place.

    Example:
        >>> x, y = torch.zeros(2), torch.ones(3)
        >>> undo = undoing_each([torch.tensor(True), torch.tensor(False)], [[x], [y]])
        >>> _ = x.add_(5), y.add_(5)
        >>> undo()
        >>> x, y
        (tensor([5., 5.]), tensor([1., 1., 1.]))
    """
    undos = []
    small: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for good, xs in zip(finite, tensors, strict=True):
        for x in xs:
            if x.numel() < SMALL:
                small.setdefault(x.dtype, []).append((good, x))
            else:
                undos.append(_undoing(good, x[None]))
    undos += [_undoing_together(pairs) for pairs in small.values()]

    def undo() -> None:
        for undo_one in undos:
            undo_one()

    return undo


def _undoing_together(pairs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    xs = [x for _, x in pairs]
    old, mask = torch.cat([x.reshape(-1) for x in xs]), torch.cat([good.expand(x.numel()) for good, x in pairs])

    def undo() -> None:
        chosen = torch.where(mask, torch.cat([x.reshape(-1) for x in xs]), old)
        parts = torch.split(chosen, [x.numel() for x in xs])
        torch._foreach_copy_(xs, [part.view(x.shape) for part, x in zip(parts, xs, strict=True)])

    return undo


def _undoing(finite: Tensor, x: Tensor) -> Callable[[], object]:
    if kernels.keeping_pays(x):  # on a GPU, the kernel moves only what is restored
        from steepest.kernels.keeping import put_back

        saved = torch.empty_like(x)
        put_back(x, saved, finite)
        return lambda: put_back(saved, x, finite)
    mask, old = finite.view(-1, *[1] * (x.dim() - 1)), x.clone()
    return lambda: torch.where(mask, x, old, out=x)
