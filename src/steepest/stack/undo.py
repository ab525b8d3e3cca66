"""Updates that can be undone, matrix by matrix, without asking a device which of them must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest import kernels


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


def _undoing(finite: Tensor, x: Tensor) -> Callable[[], object]:
    if kernels.keeping_pays(x):  # on a GPU, the kernel moves only what is restored
        from steepest.kernels.keeping import put_back

        saved = torch.empty_like(x)
        put_back(x, saved, finite)
        return lambda: put_back(saved, x, finite)
    mask, old = finite.view(-1, *[1] * (x.dim() - 1)), x.clone()
    return lambda: torch.where(mask, x, old, out=x)
