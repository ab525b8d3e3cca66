"""One stack, one step: what its rule makes of the gradients that have come, and what must leave no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steepest.exchange.lot import Directions
from steepest.linalg import attempts
from steepest.rule import LowRank, Rule, Step
from steepest.stack.graphs import Inputs, compiled
from steepest.stack.stack import Answers, Echo, Run, Stack, Windows, put_off, ranges, to_device
from steepest.stack.undo import undoing


def directions(
    rule: Rule,
    stack: Stack,
    grads: Windows,
    weights: Windows | None,
    group: Mapping[str, Any],
    phases: Sequence[int],
) -> Directions | None:
    """Have the rule step a stack; None if no matrix in it moves.

    Args:
        rule: its rule.
        stack: state and clocks, which advance.
        grads: gradients of its pieces; pieces without one are not in this step.
        weights: of the same pieces, if they decay by way of their gradient.
        group: by how much they decay, and how updates are launched.
        phases: for each slot when in its period it refreshes.
    """
    stack.put_off.clear()  # of a step that was broken off
    live = [seat.key in grads for seat in stack.seats for _ in seat.range]
    if not any(live):
        return None
    G = stack.fill(grads)  # [B, m, n]
    finite = _drop_nonfinite(stack, G, live)
    penalty = None if weights is None else stack.fill(weights) * group["weight_decay"]

    moved = [False] * stack.size
    made: list[tuple[slice, Tensor | LowRank]] = []
    for run in stack.runs(rule, live, phases):
        d = _update(rule, stack, run, G, penalty, finite, group)  # [b, m, n]
        if d is not None:
            moved[run.slots] = [True] * (run.slots.stop - run.slots.start)
            made.append((run.slots, d))
    if not made:
        return None
    if isinstance(made[0][1], LowRank):
        low = [(slots, d) for slots, d in made if isinstance(d, LowRank)]
        left = _joined([(slots, d.left) for slots, d in low], stack.size)
        right = _joined([(slots, d.right) for slots, d in low], stack.size)
        low_rank = LowRank(left, right)
        return Directions(stack, low_rank.product(), moved, low_rank, finite)
    D = _joined([(slots, d) for slots, d in made if isinstance(d, Tensor)], stack.size)
    return Directions(stack, D, moved, None, finite)


def _joined(parts: Sequence[tuple[slice, Tensor]], size: int) -> Tensor:
    """One tensor of ``size`` slots from those that runs have made, usually one of all; zero in between."""
    slots, x = parts[0]
    if slots == slice(0, size):
        return x
    whole = x.new_zeros(size, *x.shape[1:])
    for slots, x in parts:
        whole[slots] = x
    return whole


def _drop_nonfinite(stack: Stack, G: Tensor, live: list[bool]) -> Tensor | None:
    """Take matrices whose gradient is not finite out of this step.

    On a CPU the answer is at hand, and they leave ``live``. Elsewhere asking would wait for the device: their
    gradient becomes zero, and the mask ``[B, 1, 1]`` that is returned undoes whatever the step does to them.
    """
    norms = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    finite: Tensor = norms < safe_norm(G.dtype)  # False for NaN
    if attempts.at_hand(G):
        present = sum(live)
        live[:] = [alive and fine for alive, fine in zip(live, finite.view(-1).tolist(), strict=True)]
        stack.skipped += present - sum(live)
        return None
    undone = to_device(live, G.device) & ~finite.view(-1)
    G.masked_fill_(~finite, 0)
    stack.undone = Echo(undone.long())
    return finite


def _update(
    rule: Rule,
    stack: Stack,
    run: Run,
    G: Tensor,
    penalty: Tensor | None,
    finite: Tensor | None,
    group: Mapping[str, Any],
) -> Tensor | LowRank | None:
    """Advance the clocks of one run, and have the rule update it; where ``finite`` is False nothing happens."""
    s = run.slots
    whole = s == slice(0, stack.size)

    def part(x: Tensor) -> Tensor:
        return x if whole else x[s]

    t, failures, state = part(stack.t), part(stack.failures), {name: part(x) for name, x in stack.state.items()}
    inputs = Inputs(part(G), None if penalty is None else part(penalty), None if finite is None else part(finite))
    step = Step(t, run.stage, run.refresh, inputs.penalty, failures)
    steady = run.stage == "steady" and run.refresh is None
    compiles = steady and bool(group.get("compile")) and whole
    update = compiled(rule, G) if compiles else rule.update

    def work(inputs: Inputs) -> Tensor | LowRank | None:
        changes = [t, failures, *state.values()]
        undo = undoing(inputs.finite, changes)
        t.add_(1)
        restored = stack.storage.restored(state)
        mine = step if inputs.penalty is step.penalty else replace(step, penalty=inputs.penalty)
        D = update(inputs.G, restored, mine)
        stack.storage.store(restored, state, t)
        undo()
        return D

    stack.clock[s] += 1
    if steady and group.get("cuda_graph"):
        D = stack.recorder(work, inputs, (rule, s, compiles))
    else:
        D = work(inputs)
    if rule.defers(step):
        of_all = Step(stack.t, run.stage, failures=stack.failures)
        stack.put_off += [put_off(of_all, due, None if finite is None else finite[due]) for due in ranges(run.due)]
    return D


def finish(rule: Rule, stack: Stack, answers: Answers) -> None:
    """Have the rule do what it has put off in this step, beside what the device is told next.

    Where there are ``answers`` for a piece, what they answer is not computed again.
    """
    if not stack.put_off:
        return
    left = stack.put_off
    if any(seat.key in answers for seat in stack.seats):
        apart = [rest.of(seat, answers.get(seat.key, {})) for rest in left for seat in stack.seats]
        left = [rest for rest in apart if rest is not None]
    with stack.beside(left):
        for rest in left:
            state = {name: x[rest.slots] for name, x in stack.state.items()}
            changes = [stack.failures[rest.slots], *state.values()]
            undo = undoing(rest.finite, changes)
            restored = stack.storage.restored(state)
            rule.finish(restored, rest.step)
            stack.storage.store(restored, state, rest.step.t)
            undo()
    stack.put_off.clear()


def safe_norm(dtype: torch.dtype) -> float:
    """The largest gradient norm whose square, whitened by the smallest floor (1e-8), is finite: 1.8e15 in float32."""
    return float(torch.finfo(dtype).max ** 0.5 * 1e-4)
