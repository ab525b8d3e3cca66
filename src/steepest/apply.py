"""Moving the weights: ``W ← (1 - decay) W - lr · D``, in place, for the seats of one stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.exchange import local
from steepest.stacks import Seat, to_device

DECAY_METHODS = ("decoupled", "independent", "palm", "l2")


def decay_factor(group: Mapping[str, Any]) -> float | Tensor:
    """What the weights are multiplied by in one step.

    ``decoupled`` 1 - lr·wd (AdamW, arXiv:1711.05101); ``independent`` 1 - wd, whatever the learning rate; ``palm``
    1 - lr²·wd (PaLM, arXiv:2204.02311); ``l2`` 1, because there the decay is part of the gradient.

    >>> decay_factor({"lr": 0.1, "weight_decay": 0.5, "weight_decay_method": "palm"})
    0.995
    """
    lr: float | Tensor = group["lr"]
    wd: float = group["weight_decay"]
    method: str = group["weight_decay_method"]
    if wd == 0 or method == "l2":
        return 1.0
    return 1 - wd * {"decoupled": lr, "independent": 1.0, "palm": lr * lr}[method]


def stepped(W: Tensor, D: Tensor, lr: float | Tensor, factor: float | Tensor, decay_follows: bool) -> Tensor:
    """Where ``W`` moves along ``D``; to the last bit where `apply` moves lists of parameters in place.

    >>> stepped(torch.tensor(1.0), torch.tensor(0.5), lr=0.1, factor=0.9, decay_follows=False)
    tensor(0.8500)
    """
    W = W if decay_follows else W * factor
    W = W - lr * D if isinstance(lr, Tensor) else torch.add(W, D, alpha=-lr)
    return W * factor if decay_follows else W


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
    factor, lr = decay_factor(group), group["lr"]
    plain = []
    for seat in seats:
        p = group["params"][seat.index]
        takes = moved[seat.start : seat.stop]
        if finite is None and p.dtype == D.dtype and all(takes):
            plain.append(seat)
        elif any(takes):
            W = seat.view.matrices(p, seat.piece).to(D.dtype)  # [b, m, n]
            new = stepped(W, D[seat.slots], lr, factor, decay_follows)
            if not all(takes):
                new = torch.where(to_device(takes, D.device).view(-1, 1, 1), new, W)
            if finite is not None:
                new = torch.where(finite[seat.slots], new, W)
            seat.view.window(p, seat.piece).copy_(seat.view.shaped(new, seat.piece))
    if plain:
        weights = [seat.view.window(group["params"][seat.index], seat.piece) for seat in plain]
        steps = local.scatter(D, plain)
        decays = not (isinstance(factor, float) and factor == 1.0)
        if decays and not decay_follows:
            torch._foreach_mul_(weights, factor)
        if isinstance(lr, Tensor):
            torch._foreach_sub_(weights, [lr * step for step in steps])
        else:
            torch._foreach_add_(weights, steps, alpha=-lr)
        if decays and decay_follows:
            torch._foreach_mul_(weights, factor)
