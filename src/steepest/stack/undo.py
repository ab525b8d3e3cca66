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
    each = [_undoing(finite, x) for x in tensors]

    def undo() -> None:
        for put_back in each:
            put_back()

    return undo


def _undoing(finite: Tensor, x: Tensor) -> Callable[[], object]:
    if kernels.keeping_pays(x):  # on a GPU: nothing is moved but what is put back
        from steepest.kernels.keeping import put_back

        kept = torch.empty_like(x)
        put_back(x, kept, finite)
        return lambda: put_back(kept, x, finite)
    mask, old = finite.view(-1, *[1] * (x.dim() - 1)), x.clone()
    return lambda: torch.where(mask, x, old, out=x)
