"""One step of the parameters that are no matrices: torch.optim's own functions, on lists of what this rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.engine.apply import write
from steepest.engine.step import safe_norm
from steepest.exchange.placement import is_shared, local, place
from steepest.linalg import attempts
from steepest.linalg.phases import phase
from steepest.rule import Elementwise, State
from steepest.stack.names import parameter_name
from steepest.stack.stack import beside
from steepest.stack.undo import undoing

if TYPE_CHECKING:
    from steepest.exchange.domain import Domain


@phase("elementwise")
def step_elementwise(
    rule: Elementwise,
    group: Mapping[str, Any],
    number: int,
    grads: Sequence[Tensor | None],
    states: Mapping[Tensor, State],
    homes: Mapping[Tensor, Domain],
) -> Tensor | int:
    """Step the parameters of a group that have a gradient.

    Args:
        rule: the group's.
        group: parameters and options.
        number: the group's.
        grads: by position, what this rank holds of the gradients; None takes no part.
        states: each parameter's.
        homes: the ranks that hold parts of a parameter, if there are others.

    Returns:
        How many parameters were left out since their gradient is not finite.
    """
    batches: dict[Any, list[int]] = {}
    for i, (p, grad) in enumerate(zip(group["params"], grads, strict=True)):
        if grad is not None and p.numel():
            batches.setdefault((p.device, p.dtype, homes.get(p)), []).append(i)
    skipped: Tensor | int = 0
    for (*_, home), indices in batches.items():
        parts = {i: _here(group["params"][i], states[group["params"][i]]) for i in indices}
        near = {i: beside(parts[i], local(group["params"][i]), grad) for i in indices if (grad := grads[i]) is not None}
        norms = torch.stack(torch._foreach_norm(list(near.values())))
        finite = norms < safe_norm(norms.dtype)
        if home is not None:
            finite = home.all(finite)
        skipped = skipped + (~finite).sum()
        mask = None if attempts.at_hand(finite) else finite
        if mask is None:
            indices = [i for i, fine in zip(indices, finite.tolist(), strict=True) if fine]
        _apply(rule, group, number, [(i, near[i], parts[i]) for i in indices], mask)
    return skipped


def _here(p: Tensor, state: State) -> State:
    """What this rank holds of a parameter's state."""
    return {name: local(x) for name, x in state.items()} if is_shared(p) else state


def _apply(
    rule: Elementwise,
    group: Mapping[str, Any],
    number: int,
    batch: Sequence[tuple[int, Tensor, State]],
    finite: Tensor | None,
) -> None:
    if not batch:
        return
    params = [group["params"][i] for i, *_ in batch]
    grads = [grad for _, grad, _ in batch]
    states = [state for *_, state in batch]
    # The weights themselves, unless their dtype is too coarse to step in.
    weights = [beside(state, local(p), local(p)) for p, state in zip(params, states, strict=True)]
    everything = [[x[None] for x in (W, *state.values())] for W, state in zip(weights, states, strict=True)]
    undos = [] if finite is None else [undoing(fine, xs) for fine, xs in zip(finite, everything, strict=True)]
    lanes = [_in_whole_lanes(W, grad, state) for W, grad, state in zip(weights, grads, states, strict=True)]
    rule.apply(
        [W for W, _, _ in lanes],
        [grad for _, grad, _ in lanes],
        [state for _, _, state in lanes],
        group["lr"],
        group["weight_decay"],
    )
    for (W, _, state), own, own_state in zip(lanes, weights, states, strict=True):
        if W is not own:
            for x, mine in [(W, own), *((state[name], own_state[name]) for name in state)]:
                mine.copy_(x[: mine.numel()].view(mine.shape) if x.dim() else x)
    for undo in undos:
        undo()
    for (i, *_), p, W, state in zip(batch, params, weights, states, strict=True):
        if W is not local(p):
            write(group, parameter_name(group, number, i), local(p), W, partial(place, p), state["step"])


def _in_whole_lanes(W: Tensor, grad: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """The same with as many numbers as fill a CPU's vector registers; themselves if they do, or on other devices.

    torch's fused functions round a remainder otherwise than whole registers. A shard would then differ in its last
    bits from the same part of the whole.
    """
    short = -W.numel() % LANES
    if not short or W.device.type != "cpu":
        return W, grad, state

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x.reshape(-1), x.new_zeros(short)])

    return padded(W), padded(grad), {name: x if name == "step" else padded(x) for name, x in state.items()}


LANES = 16
"""Numbers in the widest registers there are: AVX-512's, in float32."""
