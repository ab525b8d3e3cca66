"""What ``steepest plan`` computes: how a model's step would be shared out among ranks, without any rank.

The plan is the optimizer's own (`steepest.exchange.plan`), state is what a rule's ``init`` lays out, FLOPs are
those of `steepest.rule.work`, and `steepest.lab.plan.time` makes seconds of them where a device is given. What that
leaves out: bytes that travel, faster within a machine than between two, and waiting for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.plan import BUCKET_BYTES, Job, Plan, make_plan
from steepest.lab.plan.devices import Device
from steepest.lab.plan.models import Model, Weight
from steepest.lab.plan.time import MFU, Forecast, Load, Matrix, entry_bytes, forecast, phases
from steepest.lab.shared.errors import BadInput
from steepest.rule import Elementwise, Rule
from steepest.rule.work import work
from steepest.stack.storage import laid_out

Piece = tuple[int, int, int]
"""Matrices of a parameter: how many, rows, columns."""

FLAT = {"fsdp": 0, "ddp": None, "tp": 1}
DEEP = {"hsdp": (None, 0), "fsdp+tp": (0, 1)}
"""What layouts on meshes of one and of two dimensions cut, as in `Mesh.cuts`."""

DIRECTION_BYTES = 4
"""Directions travel in the state's dtype, float32."""


@dataclass(frozen=True)
class Mesh:
    """How parameters lie on the ranks. Which way tensor parallelism cuts a matrix makes no difference to the bytes."""

    name: str
    shape: tuple[int, ...]
    cuts: tuple[int | None, ...]
    """By dimension of the mesh: which dimension of a parameter it cuts, if it has that one; None replicates."""

    @property
    def world(self) -> int:
        """Ranks."""
        return math.prod(self.shape)

    def layout(self, shape: Sequence[int]) -> Layout:
        """Of a parameter; scalars are cut by nothing, vectors by no tensor parallelism."""
        return _layout(tuple(shape), self.shape, tuple(d if d is None or d < len(shape) else None for d in self.cuts))


def mesh(text: str, world: int) -> Mesh:
    """The mesh that ``fsdp``, ``ddp``, ``tp``, ``hsdp:RxS`` (R replicas of S shards) or ``fsdp+tp:SxT`` stands for.

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
    """What a rank would hold, send and compute. Means are over ranks; the largest is what limits."""

    model: str
    parameters: int
    optimizer: str
    layout: str
    world: int
    block_size: int
    """0: matrices whole."""
    matrices: int
    buckets: int
    state_max: float
    """Bytes of optimizer state on a rank, matrices' and the rest's."""
    state_mean: float
    elementwise_max: float
    """Of these, the elementwise rule's."""
    sent_in_max: int
    """Bytes of gradients that a rank sends to owners in a step."""
    sent_in_mean: float
    sent_out_max: int
    """Bytes of directions that an owner sends back."""
    sent_out_mean: float
    flops_max: float
    """FLOPs of an optimizer step on a rank, refreshes on the average."""
    flops_mean: float
    lockstep: float
    """FLOPs from first to last if all ranks wait for each other after each bucket."""
    share: float
    """FLOPs of the optimizer step on the slowest rank, by those of the model's, 6 per parameter and token."""
    forecast: Forecast | None = None
    """What a device makes of it, if one is given."""

    @property
    def balance(self) -> float:
        """Largest load by mean load; 1 is perfect."""
        return self.flops_max / self.flops_mean if self.flops_mean else 1.0


def look(
    model: Model,
    on: Mesh,
    tokens: int,
    bucket_bytes: int = BUCKET_BYTES,
    device: Device | None = None,
    mfu: float = MFU,
) -> Outlook:
    """Plan a model's step, and add up.

    Args:
        model: what is stepped.
        on: how it lies on the ranks.
        tokens: of a training step, over all ranks.
        bucket_bytes: as `steepest.exchange.plan.make_plan` has it.
        device: what every rank is; None: nothing is said about time.
        mfu: as `steepest.lab.plan.time.forecast` has it.
    """
    own = _own(model, on)
    plan = make_plan(jobs(model, on), on.world, bucket_bytes=bucket_bytes, loads=own.flops)
    training = 6 * model.parameters * tokens / on.world
    loads = [sum(parts) for parts in zip(plan.loads(), own.flops, strict=True)]
    state = [sum(parts) for parts in zip(plan.memory(), own.state, own.elementwise, strict=True)]
    traffic = plan.traffic()
    return Outlook(
        model=model.name,
        parameters=model.parameters,
        optimizer=model.optimizer,
        layout=on.name,
        world=on.world,
        block_size=model.block_size,
        matrices=sum(b for weight in model.weights if weight.view for b, _, _ in weight.view.pieces),
        buckets=len(plan.buckets),
        state_max=max(state),
        state_mean=_mean(state),
        elementwise_max=max(own.elementwise),
        sent_in_max=max(traffic.sent_in),
        sent_in_mean=_mean(traffic.sent_in),
        sent_out_max=max(traffic.sent_out),
        sent_out_mean=_mean(traffic.sent_out),
        flops_max=max(loads),
        flops_mean=_mean(loads),
        lockstep=plan.lockstep() + max(own.flops),
        share=max(loads) / training,
        forecast=None
        if device is None
        else forecast(
            (model.rule, model.elementwise),
            _loads(model, on, plan, own, state),
            training,
            device,
            max(weight.itemsize for weight in model.weights),
            mfu,
        ),
    )


def jobs(model: Model, on: Mesh) -> Iterator[Job]:
    """What can be shared out, as the engine does it: each piece of a parameter by itself, if it is a box there."""
    return (job for job, _, _ in _jobs(model, on))


def _jobs(model: Model, on: Mesh) -> Iterator[tuple[Job, Weight, range]]:
    """Each with its parameter, and the numbers of the pieces that are in it."""
    for weight in model.weights:
        if weight.view is None or _stays(weight, on):
            continue
        layout, pieces = on.layout(weight.shape), weight.view.pieces
        boxes = [box for piece in range(len(pieces)) if (box := weight.view.slices(piece)) is not None]
        if len(boxes) < max(len(pieces), 2):
            yield _job(model, weight, layout, layout.whole, weight.name, tuple(pieces)), weight, range(len(pieces))
            continue
        for number, (box, piece) in enumerate(zip(boxes, pieces, strict=True)):
            window = Rectangle(tuple(s.start for s in box), tuple(s.stop - s.start for s in box))
            job = _job(model, weight, layout, window, f"{weight.name}.{number}", (piece,))
            yield job, weight, range(number, number + 1)


def _loads(model: Model, on: Mesh, plan: Plan, own: Own, state: Sequence[float]) -> list[Load]:
    """What each rank steps and holds."""
    matrices: list[Counter[Matrix]] = [Counter() for _ in range(on.world)]
    stacks: list[set[tuple[int, int, int]]] = [set() for _ in range(on.world)]
    parameters = [0.0] * on.world
    for weight, count in Counter(replace(weight, name="") for weight in model.weights).items():
        for rank, part in enumerate(on.layout(weight.shape).shards):
            parameters[rank] += count * part.size
    turns = _turns(model)
    bucket_of = {j: number for number, bucket in enumerate(plan.buckets) for j in bucket}

    def give(rank: int, bucket: int, weight: Weight, piece: int, share: slice) -> None:
        assert weight.view is not None
        _, m, n = weight.view.pieces[piece]
        matrices[rank].update((m, n, turn) for turn in turns[weight.name, piece][share])
        stacks[rank].add((bucket, m, n))

    for j, (_, weight, pieces) in enumerate(_jobs(model, on)):
        for piece in pieces:
            give(plan.owners[j], bucket_of[j], weight, piece, slice(None))
    for weight in model.weights:
        if weight.view is None or not _stays(weight, on):
            continue
        for rank, part in enumerate(on.layout(weight.shape).shards):
            for piece, (b, _, _) in enumerate(weight.view.pieces if part.size else []):
                each = b // weight.shape[0]  # of the first dimension, by which it is cut
                give(rank, -1, weight, piece, slice(part.start[0] * each, (part.start[0] + part.shape[0]) * each))
    entries = [held / entry_bytes(model.elementwise) for held in own.elementwise]
    ranks = zip(matrices, stacks, entries, parameters, state, strict=True)
    return [Load(m, len(s), e, p, b) for m, s, e, p, b in ranks]


def _turns(model: Model) -> dict[tuple[str, int], list[int]]:
    """By parameter and piece: when each of its matrices refreshes if staggered, over the whole group."""
    slots = sorted(
        (weight.name, piece, k, m, n)
        for weight in model.weights
        if weight.view is not None
        for piece, (b, m, n) in enumerate(weight.view.pieces)
        for k in range(b)
    )
    turns: dict[tuple[str, int], list[int]] = {}
    if isinstance(model.rule, Rule):
        spread_out = phases(model.rule, [(m, n) for *_, m, n in slots])
        for (name, piece, *_), turn in zip(slots, spread_out, strict=True):
            turns.setdefault((name, piece), []).append(turn)
    return turns


@dataclass
class Own:
    """What each rank does for what it holds, whatever the plan: elementwise steps, and steps of whole experts."""

    flops: list[float]
    state: list[float]
    """Bytes."""
    elementwise: list[float]
    """Bytes, too."""


def _own(model: Model, on: Mesh) -> Own:
    own = Own(*([0.0] * on.world for _ in range(3)))
    alike = Counter(replace(weight, name="") for weight in model.weights if weight.view is None or _stays(weight, on))
    for weight, count in alike.items():
        layout = on.layout(weight.shape)
        if weight.view is None:
            per_entry = count * entry_bytes(model.elementwise)
            for rank, part in enumerate(layout.shards):
                own.elementwise[rank] += per_entry * part.size
            continue
        flops, size = _price(model.rule, tuple(weight.view.pieces))
        for rank, part in enumerate(layout.shards):
            share = count * part.size / layout.whole.size
            own.flops[rank] += share * flops
            own.state[rank] += share * size
    return own


def _stays(weight: Weight, on: Mesh) -> bool:
    """Whether a parameter is a stack of matrices, as experts are, that lies on ranks by whole matrices."""
    if weight.view is None or weight.view.merge_dims or len(weight.shape) < 3 or weight.view.heads > 1:
        return False
    layout = on.layout(weight.shape)
    parts = {part for part in layout.shards if not part.empty}
    return len(parts) > 1 and all(part.shape[1:] == layout.shape[1:] for part in parts)


def _job(model: Model, weight: Weight, layout: Layout, window: Rectangle, name: str, pieces: tuple[Piece, ...]) -> Job:
    cost, memory = _price(model.rule, pieces)
    assert isinstance(model.rule, Rule)
    factored = sum(b * (m + n) * model.rule.rank(m, n) for b, m, n in pieces)
    return Job(
        name,
        layout,
        window,
        cost,
        memory,
        itemsizes=(weight.itemsize, DIRECTION_BYTES),
        factored=factored,
    )


@cache
def _price(rule: Rule | Elementwise, pieces: tuple[Piece, ...]) -> tuple[float, int]:
    """FLOPs of a step of some matrices, and bytes of their state."""
    assert isinstance(rule, Rule)
    states = [laid_out(rule, torch.empty(piece, device="meta")) for piece in pieces]
    flops = sum(b * work(rule, m, n).total for b, m, n in pieces)
    return flops, sum(x.nbytes for state in states for x in state.values())


@cache
def _layout(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[int | None, ...]) -> Layout:
    return Layout.sharded(shape, mesh, placements)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
