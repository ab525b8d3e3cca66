"""Decompositions that never raise: a failure is tried again, and a matrix that fails again comes out as NaN.

LAPACK's and cuSOLVER's float32 solvers fail to converge on some nearly singular matrices, and then refuse their whole
batch. In a training step an exception would come when half of the weights have moved. NaN, matrix by matrix, is an
answer that stays on the device, where `torch.where` puts the last good result in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steepest.linalg.untraced import untraced

calls = 0
"""How often `attempt` was called: a step that calls it can't be recorded for replays (`steepest.stack.graphs`)."""


@untraced  # solvers don't compile, and what surrounds them would be compiled anew for each shape
def attempt(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """Return ``solve(A)``; matrices for which it fails are tried again alone, in float64, and in float64 on the CPU.

    An exception counts as a failure, and so do entries that are not finite, where they can be read without waiting for
    a device. A matrix that doesn't fail gets the bits that it would get without the others.

    Args:
        solve: from ``[..., m, n]`` to the same shape, in whatever dtype and on whatever device it is given.
        A: ``[..., m, n]``.

    Returns:
        ``[..., m, n]`` in A's dtype; all NaN where every solver failed.

    Example:
        >>> A = torch.tensor([[[4.0]], [[-1.0]]])
        >>> attempt(torch.linalg.cholesky, A).flatten()
        tensor([2., nan])
    """
    global calls
    calls += 1
    try:
        X = solve(A) if together(A) else one_by_one(solve, A)
        if not at_hand(A):
            return X
        good = succeeded(X)
        if bool(good.all()):
            return X
        failed = [i for i, fine in enumerate(good.view(-1).tolist()) if not fine]
        X = X.reshape(-1, *X.shape[-2:]).clone()
    except RuntimeError:
        X = torch.empty_like(A.reshape(-1, *A.shape[-2:]))
        failed = list(range(len(X)))
    for i in failed:
        X[i : i + 1].copy_(_alone(solve, A.reshape(-1, *A.shape[-2:])[i : i + 1]))
    return X.reshape(A.shape)


def each(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """``solve(A)``, from ``[..., m, n]`` to the same shape; each matrix gets the bits that it would get alone.

    >>> each(torch.linalg.cholesky, torch.full((2, 1, 1), 4.0)).flatten()
    tensor([2., 2.])
    """
    return solve(A) if together(A) else one_by_one(solve, A)


def together(A: Tensor) -> bool:
    """Whether a function that takes a stack matrix by matrix gives each of ``A [..., m, n]`` the bits it gets alone.

    On a CPU such functions round otherwise where a matrix doesn't begin at a multiple of 64 bytes.

    >>> together(torch.zeros(2, 4, 4)), together(torch.zeros(2, 3, 3))
    (True, False)
    """
    m, n = A.shape[-2:]
    return A.device.type != "cpu" or m * n * A.itemsize % 64 == 0 or A.numel() <= m * n


def one_by_one(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """``solve`` of each matrix of ``A [..., m, n]`` by itself, in the layout (by rows or by columns) that it gives."""
    found = [solve(one.clone()) for one in A.reshape(-1, 1, *A.shape[-2:])]
    if found[0].is_contiguous():
        return torch.cat(found).view(A.shape)
    return torch.cat([x.mT for x in found]).view(*A.shape[:-2], A.shape[-1], A.shape[-2]).mT


def succeeded(X: Tensor) -> Tensor:
    """Whether each matrix of ``X [..., m, n]``, which `attempt` returned, is a result: a bool tensor ``[...]``.

    >>> succeeded(torch.tensor([[[1.0, 0.0]], [[torch.nan, 0.0]]]))
    tensor([ True, False])
    """
    return torch.isfinite(X.sum(dim=(-2, -1)))


def at_hand(x: Tensor) -> bool:
    """Whether the host can read ``x`` without waiting for a device."""
    return x.device.type == "cpu"


def _alone(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """One matrix ``[1, m, n]``, by the first of three ways that gives a finite result; this may wait for the device."""
    ways: tuple[Callable[[], Tensor], ...] = (lambda: A, A.double, lambda: A.double().cpu())
    for way in ways:
        try:
            X = solve(way())
        except RuntimeError:
            continue
        if succeeded(X):
            return X
    return torch.full_like(A, torch.nan)
