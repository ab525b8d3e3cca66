"""Decompositions that never raise: what fails is tried again, and what fails again comes out as NaN.

LAPACK's and cuSOLVER's float32 solvers fail to converge on some nearly singular matrices, and then refuse their whole
batch. In a training step an exception would come when half of the weights have moved. NaN, matrix by matrix, is an
answer that stays on the device, where `torch.where` puts something older in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, it imports no compiler until there is one

calls = 0
"""How often `attempt` was called: a step that calls it can't be recorded for replays (`steepest.stack.graphs`)."""


@_disable_dynamo  # solvers don't compile, and what surrounds them would be compiled anew for each shape
def attempt(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """``solve(A)``; matrices for which that fails are tried again alone, in float64, and in float64 on the CPU.

    An exception counts as a failure, and so do entries that are not finite, where they can be read without waiting for
    a device. Matrices that don't fail get the bits that they would get without the others.

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
    flat = A.reshape(-1, *A.shape[-2:])
    try:
        X = each(solve, A)
        failed = [i for i, good in enumerate(succeeded(X).view(-1).tolist()) if not good] if at_hand(A) else []
        if not failed:
            return X
        X = X.reshape(flat.shape).clone()
    except RuntimeError:
        X = torch.empty_like(flat)
        failed = list(range(len(flat)))
    for i in failed:
        X[i : i + 1].copy_(_alone(solve, flat[i : i + 1]))
    return X.reshape(A.shape)


def each(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """``solve(A)``, from ``[..., m, n]`` to the same shape, by functions that take a stack matrix by matrix.

    On a CPU such functions round otherwise where a matrix doesn't begin at a multiple of 64 bytes. Stacks in which not
    all do are cut, so that each gets the bits that it would get alone, and in the same layout, by rows or by columns.

    >>> each(torch.linalg.cholesky, torch.full((2, 1, 1), 4.0)).flatten()
    tensor([2., 2.])
    """
    flat = A.reshape(-1, *A.shape[-2:])
    if A.device.type != "cpu" or len(flat) < 2 or flat[0].nbytes % 64 == 0:
        return solve(A)
    found = [solve(one.clone()) for one in flat.unsqueeze(1)]
    if found[0].is_contiguous():
        return torch.cat(found).view(A.shape)
    return torch.cat([x.mT for x in found]).view(*A.shape[:-2], A.shape[-1], A.shape[-2]).mT


def succeeded(X: Tensor) -> Tensor:
    """Matrix by matrix, whether what `attempt` returned is a result: a bool tensor ``[...]`` for ``X [..., m, n]``.

    >>> succeeded(torch.tensor([[[1.0, 0.0]], [[torch.nan, 0.0]]]))
    tensor([ True, False])
    """
    return torch.isfinite(X.sum(dim=(-2, -1)))


def at_hand(x: Tensor) -> bool:
    """Whether the host can read ``x`` without waiting for a device."""
    return x.device.type == "cpu"


def _alone(solve: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """One matrix ``[1, m, n]``, by the first of the ways that gives a finite result; whoever comes here may wait."""
    ways: tuple[Callable[[], Tensor], ...] = (lambda: A, A.double, lambda: A.double().cpu())
    for way in ways:
        try:
            X = solve(way())
        except RuntimeError:
            continue
        if succeeded(X):
            return X
    return torch.full_like(A, torch.nan)
