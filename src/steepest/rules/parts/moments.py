"""Adam's two moments on a stack, with two floors that make it safe inside an eigenbasis.

An eigenbasis that already contains the gradient it projects makes that gradient diagonal up to rounding: the entries
off the diagonal are noise, and Adam, which gives every entry a full-size step, would amplify it. See
docs/first-steps.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from steepest import kernels
from steepest.kernels.precision import INTERPRETED
from steepest.linalg import attempts
from steepest.rule import State, Step
from steepest.stack.undo import undoing

ZERO = 1e-300
"""For a decay of zero, which has no logarithm: its powers vanish all the same."""


def adam(
    g: Tensor,
    state: State,
    t: Tensor,
    betas: tuple[float, float],
    eps: float,
    lost: Tensor | None = None,
    *,
    correct_bias: bool = True,
    nesterov: bool = False,
    momentum_floor: bool = False,
    noise_floor: float = 0.0,
) -> Tensor:
    """Take ``g [B, m, n]`` into ``exp_avg`` and ``exp_avg_sq``, in place, and return Adam's direction ``[B, m, n]``.

    With m̂ and v̂ the two moments after bias correction, the direction is ``m̂ / (sqrt(v̂) + eps)`` (Kingma and Ba,
    arXiv:1412.6980, Algorithm 1).

    Args:
        g: gradients, in whatever coordinates the moments are kept.
        state: holds ``exp_avg`` and ``exp_avg_sq``, ``[B, m, n]``.
        t: ``[B, 1, 1]``, updates so far, this one included.
        betas: decay of the two moments.
        eps: keeps the division finite where a gradient is zero.
        lost: see `steepest.rule.Step`; the moments of these matrices stay as they are.
        correct_bias: divide the moments by what an average from zero lacks.
        nesterov: look one step ahead in the numerator (Dozat, 2016).
        momentum_floor: v̂ counts as no less than the squared numerator, so that no entry exceeds 1. For a steady
            gradient it changes nothing; right after a basis has turned, v̂ belongs to other directions, and it matters.
        noise_floor: τ. With d = sqrt(v̂) and τ_t = τ / t^(3/2) the denominator becomes ``d + τ_t² mean(v̂)/d``, as in a
            Wiener filter: entries far below τ_t times the root mean square vanish quadratically, the rest is untouched.
    """
    if (INTERPRETED or not g.is_cpu) and kernels.adam_pays(g, state["exp_avg"], state["exp_avg_sq"]):
        from steepest.kernels.adam import adam as fused  # on a GPU: the same in one pass or two

        moments = state["exp_avg"], state["exp_avg_sq"]
        undo = None if lost is None else undoing(lost == 0, moments)
        D = fused(
            *(g, *moments, t, betas, eps),
            correct_bias=correct_bias,
            nesterov=nesterov,
            momentum_floor=momentum_floor,
            noise_floor=noise_floor,
        )
        if undo is not None:
            undo()
        return D
    beta1, beta2 = betas
    rate, decay = (1 - beta1, beta2) if lost is None else (Step(t, lost=lost).rate(1 - beta1), lost.clamp(min=beta2))
    m = state["exp_avg"].lerp_(g, rate)
    v = state["exp_avg_sq"].mul_(decay).addcmul_(g, g, value=1 - beta2)
    c1, c2, ratio = corrections(*betas, t) if correct_bias else (None, None, None)
    if nesterov:
        old, new = (beta1, 1 - beta1) if c1 is None else (beta1 / correction(beta1, t + 1), (1 - beta1) / c1)
        m, c1 = m * old + g * new, None
    # It isn't m that is divided by c1: what m is divided by is multiplied by it, and d is c1 sqrt(v̂).
    square = v if c2 is None else v / c2 if c1 is None or ratio is None else v * ratio
    if momentum_floor:
        least = m.square()
        square = torch.maximum(square, least, out=least)
    mean = square.mean(dim=(-2, -1), keepdim=True) if noise_floor > 0 else None  # [B, 1, 1]
    d = square.sqrt() if square is v else square.sqrt_()
    if mean is not None:
        d.addcdiv_(mean * t.pow(-3) + 1e-30, d, value=noise_floor**2)  # where all is 0, m / d is 0 / inf
    return torch.div(m, d.add_(eps) if c1 is None else d.add_(c1, alpha=eps), out=d)


def correction(beta: float, t: Tensor) -> Tensor:
    """``1 - beta^t``, what an exponential moving average from zero lacks after t updates.

    By way of ``expm1``: in float32, ``1 - beta**t`` loses four digits at beta = 0.999.

    >>> correction(0.9, torch.tensor([1.0, 2.0]))
    tensor([0.1000, 0.1900])
    """
    return -torch.expm1(t * math.log(beta or ZERO))


Result = TypeVar("Result", Tensor, Sequence[Tensor])


def once_per_count(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Have a function of decays and of counts ``t`` compute its result once, on a CPU, for all stacks with one count.

    All matrices nearly always have the same count, and on small networks these few numbers would take as long as a
    product of matrices. Tensors that the function returns have one entry, which broadcasts like ``t``. They must not be
    changed in place.
    """

    @lru_cache(maxsize=64)
    def known(t: float, dtype: torch.dtype, dims: int, *betas: float) -> Result:
        return compute(*betas, torch.full((1,) * dims, t, dtype=dtype, device="cpu"))

    @wraps(compute)
    def lookup(*args: Any) -> Result:
        *betas, t = args
        if attempts.at_hand(t) and not (INTERPRETED or torch.compiler.is_compiling()):
            counts = t.flatten().tolist()
            if counts.count(counts[0]) == len(counts):
                return known(counts[0], t.dtype, t.dim(), *betas)
        return compute(*args)

    return lookup


@once_per_count
def corrections(beta1: float, beta2: float, t: Tensor) -> Sequence[Tensor]:
    """``c1 = 1 - beta1^t``, ``c2 = 1 - beta2^t``, and c1² / c2."""
    if torch.compiler.is_compiling():  # it fuses them itself, and Inductor 2.13 fails on these lists
        c1, c2 = correction(beta1, t), correction(beta2, t)
    else:
        logs = [math.log(beta1 or ZERO), math.log(beta2 or ZERO)]
        c1, c2 = torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul([t, t], logs)))
    return c1, c2, c1.square() / c2


@once_per_count
def corrected_beta(beta: float, t: Tensor) -> Tensor:
    """The decay ``1 - (1-β)/(1-β^t)`` that makes an average from zero unbiased at every step; 0 at t = 1.

    >>> corrected_beta(0.5, torch.tensor([1.0, 2.0]))
    tensor([0.0000, 0.3333])
    """
    return torch.rsub(torch.expm1(t * math.log(beta or ZERO)).reciprocal(), 1, alpha=beta - 1)


def clip_rms(D: Tensor, limit: float) -> Tensor:
    """Each matrix of ``D [B, m, n]`` scaled down to a root mean square of at most ``limit``; 0 means no limit.

    >>> clip_rms(torch.full((1, 2, 2), 4.0), 1.0).amax()
    tensor(1.)
    """
    if limit <= 0:
        return D
    rms = D.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return D * (limit / (rms + 1e-7)).clamp(max=1.0)
