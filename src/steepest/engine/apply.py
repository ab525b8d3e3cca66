"""Moving the weights: ``W ← (1 - decay) W - lr · D``, in place; and writing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.exchange.lot import Move
from steepest.linalg.phases import phase
from steepest.linalg.rounding import positions, round_stochastically, rounding_key
from steepest.stack.names import parameter_name


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


@phase("apply")
def apply(group: Mapping[str, Any], number: int, moves: Sequence[Move], decay_follows: bool) -> None:
    """Move weights, in place.

    Args:
        group: learning rate, decay and rounding.
        number: the group's.
        moves: parts of its parameters, and where they go.
        decay_follows: decay after the step, as SOAP's authors do, not before.
    """
    plain = [move for move in moves if not move.may_stay and move.W.dtype == move.D.dtype]
    if plain:
        _move(group, [move.W for move in plain], [move.D for move in plain], decay_follows)
    for move in moves:
        if move.may_stay or move.W.dtype != move.D.dtype:
            W = move.W.to(move.D.dtype)
            new = W.clone()
            _move(group, [new], [move.D], decay_follows)
            if move.may_stay:
                new = torch.where(move.D.isnan(), W, new)
            write(group, parameter_name(group, number, move.index), move.W, new, move.place, move.t)


def write(
    group: Mapping[str, Any], name: str, out: Tensor, new: Tensor, place: Callable[[], Tensor], t: Tensor | None
) -> None:
    """Copy ``new`` into ``out``, rounded to its dtype as the group says.

    Args:
        group: ``stochastic_rounding`` and ``rounding_seed``; they count for bfloat16 only.
        name: the parameter's.
        out: the parameter or a part of it.
        new: what to write, of the same shape.
        place: where that part lies, as the same part of a tensor of the whole parameter's shape on the meta device.
        t: the count of updates, this one included.
    """
    if group["stochastic_rounding"] and out.dtype == torch.bfloat16 and t is not None:
        new = round_stochastically(new, positions(place(), new.device), rounding_key(name, group["rounding_seed"], t))
    out.copy_(new)


def _move(group: Mapping[str, Any], weights: list[Tensor], steps: list[Tensor], decay_follows: bool) -> None:
    """``W ← kept · W - lr · D`` in place, for lists of tensors of the same dtype."""
    lr = group["lr"]
    factors = _factors(group, weights, steps)
    decays = not (isinstance(factors, float) and factors == 1.0)
    if decays and not decay_follows:
        torch._foreach_mul_(weights, factors)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(weights, [lr * D for D in steps])
    else:
        torch._foreach_add_(weights, steps, alpha=-lr)
    if decays and decay_follows:
        torch._foreach_mul_(weights, factors)


def _factors(group: Mapping[str, Any], weights: list[Tensor], steps: list[Tensor]) -> Any:
    """`kept` of each weight; one number where that is the same for all."""
    if group["weight_decay_method"] == "cautious":
        return [kept(group, W, D) for W, D in zip(weights, steps, strict=True)]
    return kept(group, weights[0], steps[0])
