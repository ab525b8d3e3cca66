"""One step of the parameters that are not matrices: torch.optim's own functions, on lists of this rank's shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.engine.step import learning_rate, safe_norm, write
from steepest.exchange.peers import Peers
from steepest.exchange.shards import is_dtensor, local, meta_shard
from steepest.linalg import attempts
from steepest.rule import Elementwise, State
from steepest.stack.names import parameter_name
from steepest.stack.undo import undoing

LANES = 16
"""The numbers in the widest vector registers, which are AVX-512's, in float32."""


def step_elementwise(
    rule: Elementwise,
    group: Mapping[str, Any],
    number: int,
    grads: Sequence[Tensor | None],
    states: Mapping[Tensor, State],
    peers: Mapping[Tensor, Peers],
) -> Tensor | int:
    """Step the parameters of a group that have a gradient.

    Args:
        rule: the group's rule.
        group: parameters and options.
        number: the number of the group.
        grads: by position, this rank's shard of each gradient; None takes no part in the step.
        states: the state of each parameter.
        peers: the ranks that hold shards of a parameter, if other ranks do.

    Returns:
        The number of parameters that were skipped because their gradient is not finite.
    """
    batches: dict[Any, list[int]] = {}
    for i, (p, grad) in enumerate(zip(group["params"], grads, strict=True)):
        if grad is not None and p.numel():
            batches.setdefault((p.device, p.dtype, peers.get(p)), []).append(i)
    skipped: Tensor | int = 0
    for (*_, holders), indices in batches.items():
        local_states = {i: _local_state(group["params"][i], states[group["params"][i]]) for i in indices}
        local_grads = {
            i: _like_state(local_states[i], local(group["params"][i]), grad)
            for i in indices
            if (grad := grads[i]) is not None
        }
        norms = torch.stack(torch._foreach_norm(list(local_grads.values())))
        finite = norms < safe_norm(norms.dtype)
        if holders is not None:
            finite = holders.all(finite)
        skipped = skipped + (~finite).sum()
        mask = None if attempts.at_hand(finite) else finite
        if mask is None:
            indices = [i for i, good in zip(indices, finite.tolist(), strict=True) if good]
        _apply(rule, group, number, [(i, local_grads[i], local_states[i]) for i in indices], mask)
    return skipped


def _local_state(p: Tensor, state: State) -> State:
    """Return this rank's shard of a parameter's state."""
    return {name: local(x) for name, x in state.items()} if is_dtensor(p) else state


def _like_state(state: State, p: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` in the dtype and memory layout of p's state, because fused kernels pair entries by address."""
    for moment in state.values():
        if moment.shape == p.shape:
            p = moment
            break
    return x if x.dtype == p.dtype and x.stride() == p.stride() else torch.empty_like(p).copy_(x)


def _apply(
    rule: Elementwise,
    group: Mapping[str, Any],
    number: int,
    batch: Sequence[tuple[int, Tensor, State]],
    finite: Tensor | None,
) -> None:
    """Step parameters of one dtype and device, given by position, gradient and state; undo it where not ``finite``."""
    if not batch:
        return
    params = [group["params"][i] for i, *_ in batch]
    grads = [grad for _, grad, _ in batch]
    states = [state for *_, state in batch]
    # These are the weights themselves, unless their dtype is too coarse to step in.
    weights = [_like_state(state, local(p), local(p)) for p, state in zip(params, states, strict=True)]
    changed = [[x[None] for x in (W, *state.values())] for W, state in zip(weights, states, strict=True)]
    undos = [] if finite is None else [undoing(good, xs) for good, xs in zip(finite, changed, strict=True)]
    padded = [_in_whole_lanes(W, grad, state) for W, grad, state in zip(weights, grads, states, strict=True)]
    rule.apply(
        [W for W, _, _ in padded],
        [grad for _, grad, _ in padded],
        [state for _, _, state in padded],
        learning_rate(group, weights[0]),
        group["weight_decay"],
    )
    for (W, _, state), own, own_state in zip(padded, weights, states, strict=True):
        if W is not own:
            for x, target in [(W, own), *((state[name], own_state[name]) for name in state)]:
                target.copy_(x[: target.numel()].view(target.shape) if x.dim() else x)
    for undo in undos:
        undo()
    for (i, *_), p, W, state in zip(batch, params, weights, states, strict=True):
        if W is not local(p):
            write(group, parameter_name(group, number, i), local(p), W, partial(meta_shard, p), state["step"])


def _in_whole_lanes(W: Tensor, grad: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """Return the tensors padded to whole vector registers on a CPU; unchanged if they fill them, or elsewhere.

    torch's fused functions round a remainder differently from whole registers. A shard would then differ in its last
    bits from the same part of the whole parameter.
    """
    short = -W.numel() % LANES
    if not short or W.device.type != "cpu":
        return W, grad, state

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x.reshape(-1), x.new_zeros(short)])

    return padded(W), padded(grad), {name: x if name == "step" else padded(x) for name, x in state.items()}
