"""Closures that return the loss in its graph, for optimizers that differentiate it themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.newton.flat import falls
from steepest.newton.products import Likelihood, Product, likelihood_hessian, output_hessian
from steepest.newton.residual import Residual

Closure = Callable[[], Any]

HALVINGS = 10


class Evaluated(NamedTuple):
    """What a closure returned."""

    loss: Tensor
    """``[]``"""
    outputs: Tensor | None
    """Of any shape; None where the closure returned the loss alone."""


def evaluate(closure: Any, name: str, *, outputs: bool) -> Evaluated:
    """Call a closure with gradients enabled, and look at what it returns.

    Args:
        closure: returns the loss, or ``(outputs, loss)``.
        name: of the optimizer, for messages.
        outputs: whether outputs are needed.

    Raises:
        TypeError: without a closure, and for one that returns something else.
        ValueError: for a loss that is not one number.

    Example:
        >>> evaluate(lambda: torch.ones(()), "NewtonCG", outputs=False)
        Evaluated(loss=tensor(1.), outputs=None)
        >>> evaluate(lambda: 1.0, "NewtonCG", outputs=False)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: the closure returned a float: NewtonCG needs the loss as a tensor in its graph; leave out item() ...
    """
    wanted = "(outputs, loss)" if outputs else "the loss"
    if closure is None:
        raise TypeError(f"{name}.step() needs a closure that returns {wanted} without calling backward()")
    if _holds_residuals(closure):
        raise TypeError(f"{name} takes a closure, not residuals: steepest.GaussNewton takes these")
    if not callable(closure):
        raise TypeError(f"{name}.step({type(closure).__name__}): must be a closure that returns {wanted}")
    with torch.enable_grad():  # the caller's step runs without
        found = closure()
    if _holds_residuals(found):
        raise TypeError(f"the closure returned residuals: steepest.GaussNewton takes these, {name} takes {wanted}")
    pair = found if isinstance(found, tuple | list) else (None, found)
    if len(pair) != 2 or (outputs and not isinstance(pair[0], Tensor)):
        raise TypeError(f"the closure returned {_describe(found)}: {name} needs {wanted}, as tensors in their graph")
    o, loss = pair
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the closure returned {_describe(loss)}: {name} needs the loss as a tensor in its graph; leave out item() "
            "and backward()"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the closure returned a loss of shape {list(loss.shape)}: must be one number, such as its mean; "
            "vectors of residuals are for steepest.GaussNewton"
        )
    with torch.enable_grad():
        return Evaluated(loss.reshape(()), o)


def likelihood_curvature(
    outputs: Tensor, loss: Tensor, likelihood: Likelihood, loss_scale: float | None
) -> tuple[Product, float]:
    """Return the product of the outputs' Fisher matrix, and the factor c by which the loss exceeds a mean over rows.

    Where the loss is c times the mean over rows of the negative log likelihood, as torch's mean over entries is with
    ``c = 1/C``, its curvature in the outputs is c times theirs, whatever the targets. One product with a test vector
    therefore tells c, and tells a loss that belongs to another likelihood.

    Args:
        outputs: ``[rows, ..., C]``.
        loss: ``[]``, computed from the outputs.
        likelihood: of the model.
        loss_scale: c, if it is known; the loss may be any other one then.

    Raises:
        ValueError: if the loss is no multiple of the likelihood's.

    Example:
        >>> o = torch.zeros(4, 3, requires_grad=True)
        >>> likelihood_curvature(o, torch.nn.functional.mse_loss(o, torch.ones(4, 3)), "normal", None)[1]
        0.66...
    """
    fisher = likelihood_hessian(outputs, likelihood)
    if loss_scale is not None:
        return fisher, float(loss_scale)
    count = torch.arange(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
    probe = (1.3 * count + 0.7 * (0.9 * count).sin()).sin().view_as(outputs)
    ours, its = fisher(probe).flatten().double(), output_hessian(loss, outputs)(probe).flatten().double()
    if not bool(ours.any()):  # all probabilities are 0 or 1 to rounding: there is no curvature to scale
        return fisher, 1.0
    c = float(its.dot(ours) / ours.dot(ours))
    eps = torch.finfo(outputs.dtype).eps
    rounding = 1e3 * eps * abs(c) * float(probe.norm()) * outputs.shape[-1] / outputs.numel()
    # NaN counts as agreement: the step sees it, and does nothing.
    if c <= 0.0 or float((its - c * ours).norm()) > 1e-2 * float(its.norm()) + rounding:
        raise ValueError(
            f"the loss is no multiple of the negative log likelihood of likelihood={likelihood!r}, since its curvature "
            "in the outputs is another: choose the loss' own likelihood, leave padded rows out of the outputs, or set "
            "loss_scale=1.0 to use the model's Fisher matrix for another loss, such as a policy's"
        )
    return fisher, c


def backtrack(trial: Callable[[float], float], loss: float, length: float = 1.0) -> tuple[float, float]:
    """Halve a step length until the loss falls; return the length and the loss there.

    Args:
        trial: moves by a length, and returns the loss there.
        loss: the one to fall below.
        length: the first to be tried; the last is `HALVINGS` halvings shorter.

    Returns:
        The length is 0 where none of them lowers the loss. The weights are then where the last trial has moved them.

    Example:
        >>> backtrack(lambda t: (1 - 3 * t) ** 2, loss=1.0)
        (0.5, 0.25)
    """
    now = math.nan
    for _ in range(HALVINGS + 1):
        now = trial(length)
        if falls(now, loss):
            return length, now
        length /= 2
    return 0.0, now


def check_precision(params: Sequence[Tensor], name: str) -> None:
    """Raise a ValueError for weights of 16 bits, in which conjugate gradients lose their way.

    >>> check_precision([torch.zeros(1, dtype=torch.bfloat16)], "NewtonCG")
    Traceback (most recent call last):
    ValueError: parameters of torch.bfloat16: NewtonCG needs float32 or float64; cast them
    """
    for p in params:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"parameters of {p.dtype}: {name} needs float32 or float64; cast them")


def _holds_residuals(x: Any) -> bool:
    """Whether x is a Residual or a list of these."""
    return isinstance(x[0] if isinstance(x, list | tuple) and x else x, Residual)


def _describe(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {', '.join(type(e).__name__ for e in x) or 'nothing'}"
    return "None" if x is None else "the loss alone" if isinstance(x, Tensor) else f"a {type(x).__name__}"
