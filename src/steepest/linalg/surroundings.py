"""What a caller may be in the middle of, and computations stay out of: autocast, inference mode, a compiler's trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

ACCELERATOR = torch.accelerator.current_accelerator()
DEVICES = ("cpu",) if ACCELERATOR is None else ("cpu", ACCELERATOR.type)
"""The types of devices under whose autocast a caller can be."""


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function compute in the dtypes of its arguments, whatever its caller casts operations to.

    Example:
        >>> product = without_autocast(torch.matmul)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     torch.matmul(torch.eye(2), torch.eye(2)).dtype, product(torch.eye(2), torch.eye(2)).dtype
        (torch.bfloat16, torch.float32)
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return outside(*args, **kwargs)  # there may be another one
        return function(*args, **kwargs)

    return outside


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function run as it does by itself: without autocast, outside inference mode, and not traced.

    What it allocates under inference mode would be of no use later, because such tensors can't be changed outside. A
    compiler would trace what the function decides on the host, and give up.

    Example:
        >>> ones = undisturbed(torch.ones)
        >>> with torch.inference_mode():
        ...     torch.ones(1).is_inference(), ones(1).is_inference()
        (True, False)
    """
    function = without_autocast(function)

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            untraced: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return untraced(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return outside
