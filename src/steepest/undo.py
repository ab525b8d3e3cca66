"""Steps that can be undone, matrix by matrix, without asking a device which of them must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest import kernels


def undoing(finite: Tensor | None, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Keep tensors as they are.

    Args:
        finite: B bools on their device, False for what must not change; None: nothing is to be undone.
        tensors: ``[B, ...]`` each.

    Returns:
        What puts them back, in place, wherever ``finite`` is False. Nothing waits for the device.

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> undo = undoing(torch.tensor([True, False]), [x])
        >>> _ = x.add_(5)
        >>> undo()
        >>> x
        tensor([[6.],
                [2.]])
    """
    if finite is None:
        return lambda: None
    mask = finite
    each = [kernels.keeping_pays(x) for x in tensors]
    kept = [torch.empty_like(x) if pays else x.clone() for x, pays in zip(tensors, each, strict=True)]
    _put([(x, old) for x, old, pays in zip(tensors, kept, each, strict=True) if pays], mask)

    def undo() -> None:
        _put([(old, x) for x, old, pays in zip(tensors, kept, each, strict=True) if pays], mask)
        for x, old, pays in zip(tensors, kept, each, strict=True):
            if not pays:
                torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, old, out=x)

    return undo


def _put(pairs: Sequence[tuple[Tensor, Tensor]], finite: Tensor) -> None:
    if pairs:
        from steepest.kernels.keeping import put_back

        for source, target in pairs:
            put_back(source, target, finite)
