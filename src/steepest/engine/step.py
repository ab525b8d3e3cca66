"""One step of a stack: its rule turns gradients into directions, and the weights move along them.

A gradient that is not finite must leave no trace: weights, state and clocks of its matrix stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from steepest.engine.lost import Lost, lost_among, safe_norm
from steepest.exchange.bucket import Bucket, Directions, Move, Staying
from steepest.exchange.peers import Peers
from steepest.linalg import attempts
from steepest.linalg.rounding import positions, round_stochastically, rounding_key
from steepest.rule import Elementwise, LowRank, Rule, Statistics, Step
from steepest.stack.graphs import Inputs, compiled
from steepest.stack.stack import Deferred, Pieces, Run, Stack, Way, ranges, to_device
from steepest.stack.undo import undoing

# The rule.


def step_stack(
    stack: Stack,
    grads: Pieces,
    weights: Pieces | None,
    ways: Sequence[Way | None],
    offsets: Sequence[float],
    statistics: Mapping[tuple[int, int], Statistics],
    clipped: Collection[int] = (),
    lost: Lost | None = None,
) -> Directions | None:
    """Update the state of a stack by its gradients, and return directions; None if no matrix moves.

    Args:
        stack: state and clocks, which advance.
        grads: the gradients of its pieces; a piece without a gradient takes no part in the step.
        weights: the weights of pieces, where weight decay is part of the gradient.
        ways: the way in which each group is stepped.
        offsets: for each slot, the fraction of its period after which it refreshes.
        statistics: what was captured for its pieces.
        clipped: the groups whose directions `clip` will scale.
        lost: what `look_ahead` has found in its gradients, if it has looked.
    """
    stack.deferred.clear()  # a step that raised may have left something
    live = [segment.key in grads for segment in stack.segments for _ in range(segment.start, segment.stop)]
    if not any(live):
        return None
    G = stack.fill(grads)  # [B, m, n]
    lost = lost or _drop_nonfinite(stack, G, live)
    W, bad = stack.fill(weights) if weights else None, None if lost is None else lost.mask
    if bad is not None:
        G.masked_fill_(bad, 0)
        if W is not None:
            W.masked_fill_(bad, 0)  # whose decay would be a gradient
    moved = [False] * stack.size
    made: list[tuple[slice, Tensor | LowRank]] = []
    led: list[tuple[slice, Tensor]] = []  # the gradients that clipping measures directions by
    for run in stack.runs(ways, live, offsets):
        penalty = None if W is None or not run.way.penalty else W[run.slots] * run.way.penalty
        inputs = Inputs(G[run.slots], penalty, None if lost is None else lost.number[run.slots])
        d = _update(stack, run, inputs, stack.fed(run, statistics) if statistics else None)  # [b, m, n]
        if d is not None:
            moved[run.slots] = [True] * (run.slots.stop - run.slots.start)
            made.append((run.slots, d))
            if clipped:
                state = {name: x[run.slots] for name, x in stack.state.items()}
                led.append((run.slots, run.way.rule.clip_gradient(G[run.slots], state, stack.t[run.slots])))
    if not made:
        return None
    if isinstance(made[0][1], LowRank):
        left = _joined([(slots, d.left) for slots, d in made if isinstance(d, LowRank)], stack.size)
        right = _joined([(slots, d.right) for slots, d in made if isinstance(d, LowRank)], stack.size)
        low_rank = LowRank(left, right)
        D = low_rank.product()
        return Directions(stack, D, moved, low_rank, bad)
    D = _joined([(slots, d) for slots, d in made if isinstance(d, Tensor)], stack.size)
    slopes = _slopes(stack, D, _joined(led, stack.size), moved, bad, clipped) if clipped else None
    return Directions(stack, D, moved, None, bad, slopes)


def _slopes(
    stack: Stack, D: Tensor, G: Tensor, moved: list[bool], bad: Tensor | None, clipped: Collection[int]
) -> Tensor | None:
    """Return ``⟨D, G⟩`` of the matrices of clipped groups that move, ``[B]``, and 0 for others; None without any."""
    counts = [yes and s.group in clipped for s in stack.segments for yes in moved[s.slots]]
    if not any(counts):
        return None
    slopes = (D * G).sum(dim=-1).sum(dim=-1, dtype=torch.float64)  # at once it would be a whole tensor of float64
    if bad is not None:
        slopes.masked_fill_(bad.view(-1), 0.0)
    return slopes if all(counts) else slopes.where(to_device(counts, slopes.device), 0.0)


def clip(made: Sequence[Sequence[Directions]], buckets: Sequence[Bucket], clipped: Mapping[int, float]) -> None:
    """Scale directions by ``min(1, sqrt(κ / |Σ ⟨D, G⟩|))``, in place: one sum over all matrices, κ of each group.

    G is what the rule's `clip_gradient` says.

    The sum is over the matrices of all ranks, which all call this. Nothing waits for a device.

    Args:
        made: the directions of each bucket, as far as this rank has made them.
        buckets: all buckets.
        clipped: κ, by the numbers of groups.
    """
    slopes: list[Tensor] = []
    shared: dict[Peers, Tensor] = {}
    for bucket, of_bucket in zip(buckets, made, strict=True):
        own = [directions.slopes.sum() for directions in of_bucket if directions.slopes is not None]
        if bucket.communicates and bucket.peers is not None:
            zero = torch.zeros((), dtype=torch.float64, device=bucket.device)
            shared[bucket.peers] = sum(own, shared.get(bucket.peers, zero))
        else:
            slopes += own
    slopes += [peers.total(slope) for peers, slope in shared.items()]
    if not slopes:
        return
    total = torch.stack([slope.to(slopes[0].device) for slope in slopes]).sum().abs()
    for directions in chain.from_iterable(made):
        D, here = directions.D, total.to(directions.D.device)
        for number, start, stop in directions.stack.groups:
            if number in clipped:
                D[start:stop] *= (clipped[number] / here).sqrt().clamp(max=1.0).to(D.dtype)


def _joined(parts: Sequence[tuple[slice, Tensor]], size: int) -> Tensor:
    """Join the tensors that runs have made, usually one of all slots; slots in between are zero."""
    slots, x = parts[0]
    if slots == slice(0, size):
        return x
    whole = x.new_zeros(size, *x.shape[1:])
    for slots, x in parts:
        whole[slots] = x
    return whole


def _drop_nonfinite(stack: Stack, G: Tensor, live: list[bool]) -> Lost | None:
    """Take matrices whose gradient is not finite out of this step, and out of ``live`` if the answer is at hand."""
    norms = torch.linalg.vector_norm(G, dim=(-2, -1))
    if not attempts.at_hand(G):
        return lost_among([stack], norms, live)[0]
    limit = safe_norm(G.dtype)
    for slot, norm in enumerate(norms.tolist()):
        if live[slot] and not norm < limit:  # NaN is not, either
            live[slot] = False
            stack.skipped += 1
    return None


def _update(stack: Stack, run: Run, inputs: Inputs, statistics: Statistics | None) -> Tensor | LowRank | None:
    """Advance the clocks of a run, and return its directions; where gradients are lost, nothing changes."""
    slots, rule = run.slots, run.way.rule
    whole = slots == slice(0, stack.size)
    t, failures, state = stack.t, stack.failures, dict(stack.state)
    if not whole:
        t, failures, state = t[slots], failures[slots], {name: x[slots] for name, x in state.items()}
    step = Step(t, run.stage, run.refresh, inputs.penalty, failures, statistics)
    steady = run.stage == "steady" and run.refresh is None and statistics is None
    compiles = steady and whole and run.way.compile
    update = compiled(rule, inputs.G) if compiles else rule.update

    def work(inputs: Inputs) -> Tensor | LowRank | None:
        lost, changed = inputs.lost, []
        if lost is not None:
            coded = stack.storage is not None  # and rounded anew at every step
            named = {"failures": failures, **state}
            changed = [x for name, x in named.items() if coded or not rule.keeps(name, step)]
        undo = undoing(lost == 0, changed) if lost is not None and changed else None
        restored = state if stack.storage is None else stack.storage.restored(state)
        now = step
        if lost is not None or inputs.penalty is not step.penalty:
            # Where all is undone anyway, no rule need divide by a count of zero, or decompose NaN.
            counted = t if lost is None or undo is None else t + lost
            now = replace(step, t=counted, penalty=inputs.penalty, lost=lost)
        D = update(inputs.G, restored, now)
        if stack.storage is not None:
            stack.storage.store(restored, state, t)
        if undo is not None:
            undo()
        return D

    stack.clock[slots].add_(1)
    if inputs.lost is None:
        t.add_(1)
    if steady and run.way.cuda_graph:
        D = stack.recorder(work, inputs, (rule, slots, compiles))
    else:
        D = work(inputs)
    if rule.defers(step):
        for due in ranges(run.due):
            part = Step(stack.t[due], run.stage, slice(0, due.stop - due.start), failures=stack.failures[due])
            here = slice(due.start - slots.start, due.stop - slots.start)
            undone = None if inputs.lost is None else inputs.lost[here] == 0
            stack.deferred.append(Deferred(due, rule, part, undone))
    return D


def finish(stack: Stack) -> None:
    """Let rules do what they have deferred until after the step, on a GPU beside the next forward and backward pass."""
    with stack.side_stream():
        for deferred in stack.deferred:
            state = {name: x[deferred.slots] for name, x in stack.state.items()}
            changed = [stack.failures[deferred.slots], *state.values()]
            undo = None if deferred.finite is None else undoing(deferred.finite, changed)
            restored = state if stack.storage is None else stack.storage.restored(state)
            deferred.rule.finish(restored, deferred.step)
            if stack.storage is not None:
                stack.storage.store(restored, state, deferred.step.t)
            if undo is not None:
                undo()
    stack.deferred.clear()


# The weights.
def apply(rule: Rule | Elementwise, group: Mapping[str, Any], names: Sequence[str], moves: Sequence[Move]) -> None:
    """Move weights in place: ``W ← (1 - decay) W - lr · D``. What is in the directions is used up.

    Decay goes into the directions first, where one mask then zeroes those of all matrices that stay: weights are read
    and written once.

    Args:
        rule: the group's rule, which knows whether weights decay after the step, as SOAP's authors do, or before it.
        group: learning rate, weight decay and rounding.
        names: the names of all parameters.
        moves: parts of the group's parameters, and their directions.
    """
    assert isinstance(rule, Rule)
    follows = rule.decay_follows
    rate: float | Tensor = 0.0
    weights, steps, others = [], [], []
    staying: dict[int, Staying] = {}
    for move in moves:
        if move.may_stay or move.W.dtype != move.D.dtype:
            others.append(move)
        else:
            weights.append(move.W)
            steps.append(move.D)
        if move.staying is not None:
            staying[id(move.staying)] = move.staying
    if weights:
        rate = decay_into(steps, weights, group, follows)
    for move in others:
        rate = decay_into([move.D], [move.W.to(move.D.dtype)], group, follows)
    for directions in staying.values():
        directions.zero()
    if weights:
        _descend(weights, steps, rate)
    for move in others:
        W = move.W.to(move.D.dtype)
        new = W.clone()
        _descend([new], [move.D], rate)
        if move.may_stay:
            new = torch.where(move.D.isnan(), W, new)
        write(group, names[move.index], move.W, new, move.in_whole, move.t)


def decay_into(
    steps: list[Tensor], weights: list[Tensor], group: Mapping[str, Any], follows: bool = False
) -> float | Tensor:
    """Add weight decay to directions, in place, and return the rate r at which weights move: ``W ← W - r D``.

    With δ the share that decays, W - lr D - δ W is a step of lr + δ along a mean of D and W. δ is lr·wd for
    ``decoupled`` (AdamW, arXiv:1711.05101); wd, whatever the learning rate, for ``independent``; lr²·wd for ``palm``
    (PaLM, arXiv:2204.02311); for ``cautious`` lr·wd where the step shrinks the weight too, D·W >= 0, and else 0 (Chen
    et al., arXiv:2510.12402); 0 for ``l2``, because there the decay is part of the gradient.

    >>> D, W, group = torch.tensor([1.0, -1.0]), torch.ones(2), {"lr": 0.1, "weight_decay": 0.5}
    >>> W - decay_into([D], [W], group | {"weight_decay_method": "palm"}) * D
    tensor([0.8950, 1.0950])
    >>> D = torch.tensor([1.0, -1.0])
    >>> W - decay_into([D], [W], group | {"weight_decay_method": "cautious"}) * D
    tensor([0.8500, 1.1000])

    Args:
        steps: the directions.
        weights: the weights, of the same shapes and dtype.
        group: learning rate and weight decay.
        follows: whether the weights decay after they have moved along D, and not before.
    """
    lr, wd, method = learning_rate(group, steps[0]), group["weight_decay"], group["weight_decay_method"]
    if wd == 0 or method == "l2":
        return lr
    if method == "cautious":
        shrink = [(D * W >= 0) * (W - lr * D if follows else W) for D, W in zip(steps, weights, strict=True)]
        torch._foreach_add_(steps, shrink, alpha=wd)
        return lr
    share: float | Tensor = wd * {"decoupled": lr, "independent": 1.0, "palm": lr * lr}[method]
    rate = lr * (1 - share) if follows else lr
    if isinstance(share, Tensor) or isinstance(rate, Tensor):
        torch._foreach_mul_(steps, rate)
        torch._foreach_add_(steps, torch._foreach_mul(weights, share))
        return 1.0
    if share:
        torch._foreach_lerp_(steps, weights, share / (rate + share))
    return rate + share


def learning_rate(group: Mapping[str, Any], W: Tensor) -> float | Tensor:
    """Return a group's learning rate: a number, or a 0-d tensor that multiplies ``W``, at least as precise as that.

    >>> learning_rate({"lr": torch.tensor([0.5], dtype=torch.bfloat16)}, torch.ones(2))
    tensor(0.5000)
    """
    lr: float | Tensor = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    device = lr.device if attempts.at_hand(lr) else W.device  # every device takes a number from the host
    return lr.reshape(()).to(device, torch.promote_types(lr.dtype, W.dtype))


def write(
    group: Mapping[str, Any], name: str, out: Tensor, new: Tensor, in_whole: Callable[[], Tensor], t: Tensor | None
) -> None:
    """Copy ``new`` into ``out``, rounded to its dtype as the group says.

    Args:
        group: ``stochastic_rounding`` and ``rounding_seed``; they count for bfloat16 only.
        name: the name of the parameter.
        out: the parameter or a part of it.
        new: the new values, of the same shape.
        in_whole: returns the same part of a meta tensor of the whole parameter's shape.
        t: the count of updates, this one included.
    """
    if group["stochastic_rounding"] and out.dtype == torch.bfloat16 and t is not None:
        key = rounding_key(name, group["rounding_seed"], t)
        new = round_stochastically(new, positions(in_whole(), new.device), key)
    out.copy_(new)


def _descend(weights: list[Tensor], steps: list[Tensor], rate: float | Tensor) -> None:
    """Move tensors of one dtype in place: ``W ← W - rate · D``."""
    if isinstance(rate, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(steps, rate))
    else:
        torch._foreach_add_(weights, steps, alpha=-rate)


# Buckets.


def interleave(tasks: Iterable[Iterator[None]]) -> None:
    """Run the steps of buckets interleaved: while one computes, the next one's gradients travel."""
    paused: list[Iterator[None]] = []
    for task in tasks:
        paused = [t for t in (task, *paused) if next(t, DONE) is not DONE]
    while paused:
        paused = [t for t in paused if next(t, DONE) is not DONE]


DONE = object()
