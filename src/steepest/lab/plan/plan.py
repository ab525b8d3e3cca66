"""Simulate how a model's optimizer step is shared out among ranks, without any rank.

The plan is the optimizer's own (`steepest.exchange.plan`), state is what a rule's ``init`` lays out, FLOPs are
those that `steepest.rule.work` counts, and `steepest.lab.plan.time` makes seconds of them for a device. Communication
takes no time here, although bytes travel slower between machines than within one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from statistics import fmean

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.plan import Job, Plan, make_plan
from steepest.lab.plan.devices import Device
from steepest.lab.plan.models import Model, Weight
from steepest.lab.plan.time import MFU, Forecast, Load, entry_bytes, forecast, matrix_cost, period_of
from steepest.lab.shared.errors import BadInput
from steepest.rule import Elementwise, Rule
from steepest.stack.stagger import stagger_offsets

Piece = tuple[int, int, int]
"""Matrices of a parameter: their number, rows and columns."""

FLAT = {"fsdp": 0, "ddp": None, "tp": 1}
DEEP = {"hsdp": (None, 0), "fsdp+tp": (0, 1)}
"""The dimensions that layouts on meshes of one and of two dimensions cut, as in `Mesh.cuts`."""

DIRECTION_BYTES = 4
"""Bytes of an entry of a direction: directions travel in the state's dtype, float32."""


@dataclass(frozen=True)
class Mesh:
    """How parameters lie on the ranks. Whether tensor parallelism cuts rows or columns makes no difference in bytes."""

    name: str
    shape: tuple[int, ...]
    cuts: tuple[int | None, ...]
    """By dimension of the mesh, the dimension of a parameter that it cuts, if there is one; None replicates."""

    @property
    def world(self) -> int:
        """The number of ranks."""
        return math.prod(self.shape)

    def layout(self, shape: Sequence[int]) -> Layout:
        """Return the layout of a parameter. Scalars are cut by nothing, vectors not by tensor parallelism."""
        return _layout(tuple(shape), self.shape, tuple(d if d is None or d < len(shape) else None for d in self.cuts))


def mesh(text: str, world: int) -> Mesh:
    """Parse a layout: ``fsdp``, ``ddp``, ``tp``, ``hsdp:RxS`` (R replicas of S shards) or ``fsdp+tp:SxT``.

    Raises:
        BadInput: for anything else, or another number of ranks.

    >>> mesh("hsdp:4x8", 32).shape
    (4, 8)
    """
    if world < 1:
        raise BadInput(f"--world {world}: must be at least 1")
    if text in FLAT:
        return Mesh(text, (world,), (FLAT[text],))
    kind, _, sizes = text.partition(":")
    outer, _, inner = sizes.partition("x")
    if kind not in DEEP or not (outer.isdecimal() and inner.isdecimal()):
        raise BadInput(
            f"--layout {text}: must be fsdp, ddp, tp, hsdp:RxS for R replicas of S shards, as hsdp:4x8, or fsdp+tp:SxT "
            "for S shards of T tensor-parallel ranks"
        )
    if int(outer) * int(inner) != world:
        raise BadInput(f"--layout {text}: {outer} times {inner} are no {world} ranks (--world)")
    return Mesh(text, (int(outer), int(inner)), DEEP[kind])


@dataclass(frozen=True)
class Outlook:
    """What ranks would hold, send and compute in a step: the largest value over ranks, and the mean."""

    model: str
    parameters: int
    optimizer: str
    layout: str
    world: int
    block_size: int
    """The largest side of a block; 0 for whole matrices."""
    matrices: int
    state_max: float
    """Bytes of optimizer state, of matrices and of other parameters."""
    state_mean: float
    elementwise_max: float
    """Bytes of the elementwise rule's state."""
    sent_in_max: int
    """Bytes of gradients that a rank sends to owners."""
    sent_in_mean: float
    sent_out_max: int
    """Bytes of directions that an owner sends back."""
    sent_out_mean: float
    flops_max: float
    """FLOPs of the optimizer, refreshes on the average."""
    flops_mean: float
    lockstep: float
    """FLOPs from first to last if all ranks wait for each other after each bucket."""
    share: float
    """FLOPs of the optimizer on the slowest rank by the model's own, 6 per parameter and token."""
    forecast: Forecast | None = None
    """The predicted times, if a device is given."""

    @property
    def balance(self) -> float:
        """The largest load by the mean load; 1 is perfect."""
        return self.flops_max / self.flops_mean if self.flops_mean else 1.0


def look(model: Model, on: Mesh, tokens: int, device: Device | None = None, mfu: float = MFU) -> Outlook:
    """Plan a model's step on a mesh, and add up what every rank holds, sends and computes.

    ``tokens`` are those of a training step over all ranks. Times are predicted for ranks of a ``device``, if given;
    ``mfu`` is as in `steepest.lab.plan.time.forecast`.
    """
    ranks = _held(model, on)
    fixed = [rank.flops for rank in ranks]
    plan = make_plan(jobs(model, on), on.world, loads=fixed)
    for rank, flops, memory in zip(ranks, plan.loads(), plan.memory(), strict=True):
        rank.flops += flops
        rank.state += memory + rank.elementwise
    training = 6 * model.parameters * tokens / on.world
    predicted = None
    if device is not None:
        _hand_out(model, on, plan, ranks)
        rules, itemsize = (model.rule, model.elementwise), max(weight.itemsize for weight in model.weights)
        predicted = forecast(rules, ranks, training, device, itemsize, mfu)
    loads, traffic = [rank.flops for rank in ranks], plan.traffic()
    return Outlook(
        model=model.name,
        parameters=model.parameters,
        optimizer=model.optimizer,
        layout=on.name,
        world=on.world,
        block_size=model.block_size,
        matrices=sum(b for weight in model.weights if weight.view for b, _, _ in weight.view.pieces),
        state_max=max(rank.state for rank in ranks),
        state_mean=fmean(rank.state for rank in ranks),
        elementwise_max=max(rank.elementwise for rank in ranks),
        sent_in_max=max(traffic.sent_in),
        sent_in_mean=fmean(traffic.sent_in),
        sent_out_max=max(traffic.sent_out),
        sent_out_mean=fmean(traffic.sent_out),
        flops_max=max(loads),
        flops_mean=fmean(loads),
        lockstep=plan.lockstep() + max(fixed),
        share=max(loads) / training,
        forecast=predicted,
    )


def jobs(model: Model, on: Mesh) -> Iterator[Job]:
    """Yield the jobs of a model, as the engine makes them: one for each piece that is a rectangle of its parameter."""
    return (job for job, _, _ in _jobs(model, on))


def _jobs(model: Model, on: Mesh) -> Iterator[tuple[Job, Weight, range]]:
    """Yield each job with its parameter, and the numbers of the pieces in it."""
    for weight in model.weights:
        if weight.view is None or _stays(weight, on):
            continue
        assert isinstance(model.rule, Rule)
        layout, every = on.layout(weight.shape), range(len(weight.view.pieces))
        boxes = [box for number in every if (box := weight.view.slices(number)) is not None]
        windows: list[tuple[str, Rectangle, range]] = [(weight.name, layout.whole, every)]
        if len(boxes) == len(every) > 1:
            corners = [(tuple(s.start for s in box), tuple(s.stop - s.start for s in box)) for box in boxes]
            windows = [(f"{weight.name}.{k}", Rectangle(*pair), range(k, k + 1)) for k, pair in enumerate(corners)]
        for name, window, numbers in windows:
            pieces = tuple(weight.view.pieces[number] for number in numbers)
            cost, memory = _price(model.rule, pieces)
            job = Job(
                name,
                layout,
                window,
                cost,
                memory,
                itemsizes=(weight.itemsize, DIRECTION_BYTES),
                factored=sum(b * (m + n) * model.rule.rank(m, n) for b, m, n in pieces),
            )
            yield job, weight, numbers


def _held(model: Model, on: Mesh) -> list[Load]:
    """Return what each rank holds and steps under any plan: its weights, their elementwise steps, whole experts."""
    ranks = [Load() for _ in range(on.world)]
    for weight, count in Counter(replace(weight, name="") for weight in model.weights).items():
        layout, stays = on.layout(weight.shape), _stays(weight, on)
        flops, size = _price(model.rule, tuple(weight.view.pieces)) if weight.view and stays else (0.0, 0)
        for rank, part in zip(ranks, layout.shards, strict=True):
            rank.parameters += count * part.size
            if weight.view is None:
                rank.entries += count * part.size
                rank.elementwise += count * part.size * entry_bytes(model.elementwise, weight.shape)
            rank.flops += count * part.size / layout.whole.size * flops
            rank.state += count * part.size / layout.whole.size * size
    return ranks


def _hand_out(model: Model, on: Mesh, plan: Plan, ranks: Sequence[Load]) -> None:
    """Give each rank the matrices and stacks that it steps under a plan."""
    offsets = _refresh_offsets(model)
    bucket_of = {j: number for number, bucket in enumerate(plan.buckets) for j in bucket}

    def give(rank: int, bucket: int, weight: Weight, piece: int, share: slice = slice(None)) -> None:
        assert weight.view is not None
        _, m, n = weight.view.pieces[piece]
        ranks[rank].matrices.update((m, n, offset) for offset in offsets[weight.name, piece][share])
        ranks[rank].stacks.add((bucket, m, n))

    for j, (_, weight, pieces) in enumerate(_jobs(model, on)):
        for piece in pieces:
            give(plan.owners[j], bucket_of[j], weight, piece)
    for weight in model.weights:
        if weight.view is None or not _stays(weight, on):
            continue
        for rank, part in enumerate(on.layout(weight.shape).shards):
            for piece, (b, _, _) in enumerate(weight.view.pieces if part.size else []):
                each = b // weight.shape[0]  # matrices per expert; the layout cuts the dimension of experts
                give(rank, -1, weight, piece, slice(part.start[0] * each, (part.start[0] + part.shape[0]) * each))


def _refresh_offsets(model: Model) -> dict[tuple[str, int], list[int]]:
    """Return by parameter and piece in which step of the period each matrix refreshes if staggered over the group."""
    if not isinstance(model.rule, Rule):
        return {}
    weights = sorted((weight.name, weight.view.pieces) for weight in model.weights if weight.view is not None)
    costs = [model.rule.refresh_cost(m, n) for _, pieces in weights for b, m, n in pieces for _ in range(b)]
    offsets = iter(stagger_offsets(costs, period_of(model.rule)))
    return {(name, i): list(islice(offsets, b)) for name, pieces in weights for i, (b, _, _) in enumerate(pieces)}


def _stays(weight: Weight, on: Mesh) -> bool:
    """Return whether a parameter is a stack of matrices, as experts are, that lies on ranks by whole matrices."""
    if weight.view is None or weight.view.merge_dims or len(weight.shape) < 3 or weight.view.has_heads:
        return False
    layout = on.layout(weight.shape)
    parts = {part for part in layout.shards if not part.empty}
    return len(parts) > 1 and all(part.shape[1:] == layout.shape[1:] for part in parts)


def _price(rule: Rule | Elementwise, pieces: tuple[Piece, ...]) -> tuple[float, int]:
    """Return the FLOPs of a step of some matrices, and the bytes of their state."""
    assert isinstance(rule, Rule)
    costs = [(b, *matrix_cost(rule, m, n)) for b, m, n in pieces]
    return sum(b * work.total for b, work, _, _ in costs), sum(b * (moments + rest) for b, _, moments, rest in costs)


_layout = cache(Layout.sharded)
