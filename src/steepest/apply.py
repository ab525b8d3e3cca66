"""Moving the weights: ``W ← (1 - decay) W - lr · D``, in place, for the seats of one stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.exchange import local
from steepest.stacks import Seat, to_device

DECAY_METHODS = ("decoupled", "independent", "palm", "cautious", "l2")


def kept(group: Mapping[str, Any], W: Tensor, D: Tensor) -> float | Tensor:
    """What the weights are multiplied by in a step along ``D``.

    ``decoupled`` 1 - lr·wd (AdamW, arXiv:1711.05101); ``independent`` 1 - wd, whatever the learning rate; ``palm``
    1 - lr²·wd (PaLM, arXiv:2204.02311); ``cautious`` as decoupled, but only where the step shrinks the weight too, D·W
    >= 0 (Chen et al., arXiv:2510.12402); ``l2`` 1, because there the decay is part of the gradient.

    >>> options = {"lr": 0.1, "weight_decay": 0.5}
    >>> kept(options | {"weight_decay_method": "palm"}, torch.ones(2), torch.ones(2))
    0.995
    >>> kept(options | {"weight_decay_method": "cautious"}, torch.ones(2), torch.tensor([1.0, -1.0]))
    tensor([0.9500, 1.0000])
    """
    lr: float | Tensor = group["lr"]
    wd: float = group["weight_decay"]
    method: str = group["weight_decay_method"]
    if wd == 0 or method == "l2":
        return 1.0
    if method == "cautious":
        return 1 - (lr * wd) * (D * W >= 0).to(W.dtype)
    return 1 - wd * {"decoupled": lr, "independent": 1.0, "palm": lr * lr}[method]


def apply(
    group: Mapping[str, Any],
    seats: Sequence[Seat],
    D: Tensor,
    moved: Sequence[bool],
    finite: Tensor | None,
    decay_follows: bool,
) -> None:
    """Move the parameters in their seats along ``D [B, m, n]``.

    Args:
        group: names the parameters, learning rate and decay.
        seats: the stack's.
        D: directions; read only where ``moved``.
        moved: for every slot, whether it takes this step at all.
        finite: ``[B, 1, 1]`` on the device, False where the step must leave no trace; None if it is True everywhere.
        decay_follows: decay after the step, as SOAP's authors do, not before.
    """
    plain = []
    for seat in seats:
        p = group["params"][seat.index]
        takes = moved[seat.start : seat.stop]
        if finite is None and p.dtype == D.dtype and all(takes):
            plain.append(seat)
        elif any(takes):
            W = seat.view.matrices(p, seat.piece).to(D.dtype)  # [b, m, n]
            new = W.clone()
            _move(group, [new], [D[seat.slots]], decay_follows)
            if not all(takes):
                new = torch.where(to_device(takes, D.device).view(-1, 1, 1), new, W)
            if finite is not None:
                new = torch.where(finite[seat.slots], new, W)
            seat.view.window(p, seat.piece).copy_(seat.view.shaped(new, seat.piece))
    if plain:
        weights = [seat.view.window(group["params"][seat.index], seat.piece) for seat in plain]
        _move(group, weights, local.scatter(D, plain), decay_follows)


def _move(group: Mapping[str, Any], weights: list[Tensor], steps: list[Tensor], decay_follows: bool) -> None:
    """``W ← kept · W - lr · D`` in place, for lists of tensors of the same dtype."""
    lr = group["lr"]
    factors = [kept(group, W, D) for W, D in zip(weights, steps, strict=True)]
    if not decay_follows:
        _shrink(weights, factors)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, [lr * D for D in steps])
    else:
        torch._foreach_add_(weights, steps, alpha=-lr)
    if decay_follows:
        _shrink(weights, factors)


def _shrink(weights: list[Tensor], factors: list[float | Tensor]) -> None:
    same = factors[0]
    if isinstance(same, Tensor) and same.dim() > 0:
        torch._foreach_mul_(weights, [factor for factor in factors if isinstance(factor, Tensor)])
    elif isinstance(same, Tensor) or same != 1.0:
        torch._foreach_mul_(weights, same)
