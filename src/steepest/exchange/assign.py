"""Which rank steps which matrices: parameters are assigned to buckets.

Most parameters are plain tensors of one process, and go to a `LocalBucket`. DTensors (FSDP2, HSDP, tensor parallel) and
parameters that DDP replicates are divided among the ranks that hold shards, by a plan that every rank makes for itself
and compares with the others' at once. Stacked experts of which every rank has whole matrices are stepped where they
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from steepest.exchange.bucket import Bucket
from steepest.exchange.layout import Layout, Rectangle, fingerprint
from steepest.exchange.local import LocalBucket
from steepest.exchange.peers import Peers
from steepest.exchange.plan import Job, make_plan
from steepest.exchange.shards import local
from steepest.rule import Rule
from steepest.rule.work import work
from steepest.stack.names import parameter_names
from steepest.stack.stack import Segment, Way, lay_out, rule_of, segments_of, state_alone, state_dtype


def assign(
    ways: Sequence[Way | None],
    groups: Sequence[Mapping[str, Any]],
    params: Sequence[Tensor],
    numbered: Iterable[tuple[int, int]],
    buckets: Sequence[Bucket],
    peers: Mapping[Tensor, Peers],
    biases: Mapping[int, int],
) -> list[Bucket]:
    """Return buckets for some parameters, all of which are under rules for matrices.

    Args:
        ways: the way in which each group is stepped.
        groups: the options of all groups.
        params: the parameters of all groups.
        numbered: the numbers of the parameters that want a bucket, each with the number of its group.
        buckets: the buckets that there are already, whose loads count.
        peers: the ranks that hold shards of a parameter, as `peers_of` returns them.
        biases: the numbers of the parameters that are stepped together with a weight, by its number.

    Raises:
        RuntimeError: if the ranks that hold a parameter plan differently, since their optimizers are not of the same
            parameters with the same options. It is raised on all of them.
    """
    here: dict[tuple[Peers | None, int], list[tuple[Segment, Tensor]]] = {}  # by peers and the index of the replica
    shared: dict[Peers, list[tuple[int, int, Layout]]] = {}
    for index, number in numbered:
        p, group = params[index], groups[number]
        holders = peers.get(p)
        layout = None if holders is None else _layout(p, holders)
        if index in biases and peers.get(params[biases[index]]) != holders:
            names = parameter_names(groups)
            raise ValueError(
                f"{names[index]} and {names[biases[index]]} lie on different ranks, and {group['rule']} steps them as "
                "one matrix: shard or replicate both, or give both another rule"
            )
        if holders is None or layout is None:
            segments = segments_of(index, number, local(p), group, bias=biases.get(index))
            here.setdefault((None, 0), []).extend((s, local(p)) for s in segments)
        elif _holds_whole_matrices(layout, group):
            first = layout.shards[holders.me].start[0] * math.prod(p.shape[1:-2])
            key = holders, layout.replica(holders.me)
            segments = segments_of(index, number, local(p), group, first)
            here.setdefault(key, []).extend((s, local(p)) for s in segments)
        else:
            shared.setdefault(holders, []).append((index, number, layout))
    found: list[Bucket] = []
    for (where, replica), segments_here in here.items():
        found += [LocalBucket(stack, params, where, replica) for stack in lay_out(ways, segments_here)]
    for holders, layouts in shared.items():
        found += _shared_buckets(ways, groups, params, holders, layouts, buckets, biases)
    return found


def peers_of(params: Sequence[Tensor]) -> dict[Tensor, Peers]:
    """Return the ranks that hold shards or replicas of each parameter, for parameters that other ranks hold too.

    Raises:
        RuntimeError: if parameters that DDP replicates come in different orders on different ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    from steepest.exchange import dtensor

    replicated = dtensor.replicated()
    places = {p: place for place, p in enumerate(replicated)}
    found: dict[Tensor, Peers] = {}
    orders: dict[Peers, list[int]] = {}
    for p in params:
        if isinstance(p, dtensor.DTensor):
            found[p] = Peers.among(p.device_mesh.mesh.flatten().tolist())
        elif p in replicated:
            found[p] = Peers.over(replicated[p])
            orders.setdefault(found[p], []).append(places[p])
    for peers, order in orders.items():
        first = min(order)  # one rank may have other models besides
        peers.check_same(fingerprint([place - first for place in order]), "the order of the parameters")
    return {p: peers for p, peers in found.items() if peers.size > 1}


def _layout(p: Tensor, peers: Peers) -> Layout:
    from steepest.exchange import dtensor

    if not isinstance(p, dtensor.DTensor):
        return Layout.replicated(p.shape, peers.size)
    return Layout(tuple(p.shape), dtensor.shards(p, peers.ranks))


def _holds_whole_matrices(layout: Layout, group: Mapping[str, Any]) -> bool:
    """Return whether a parameter is a stack of matrices, as experts are, of which every rank has some whole ones."""
    stacked = len(layout.shape) > 2 and not group["merge_dims"] and group["heads"] == 1
    cut = len(set(layout.shards)) > 1
    return stacked and cut and all(s.shape[1:] == layout.shape[1:] and not s.empty for s in layout.shards)


def _shared_buckets(
    ways: Sequence[Way | None],
    groups: Sequence[Mapping[str, Any]],
    params: Sequence[Tensor],
    peers: Peers,
    layouts: Sequence[tuple[int, int, Layout]],
    buckets: Sequence[Bucket],
    biases: Mapping[int, int],
) -> list[Bucket]:
    """Plan the parameters of ``layouts`` among their peers, and return the plan's buckets."""
    from steepest.exchange.sharded import ShardedBucket

    names = parameter_names(groups)
    jobs: list[Job] = []
    segments: list[list[Segment]] = []
    for index, number, layout in layouts:
        bias = biases.get(index)
        for rectangle, members in _rectangles(segments_of(index, number, params[index], groups[number], bias=bias)):
            jobs.append(_job(rule_of(ways, members[0]), names[index], params[index], layout, rectangle, members))
            segments.append(members)
            if bias is not None and any(segment.bias is not None for segment in members):
                jobs.append(_job_of_bias(jobs[-1], names[bias], params[bias], _layout(params[bias], peers), members))
                segments.append(members)
    loads = {id(b.plan): b.plan.loads() for b in buckets if isinstance(b, ShardedBucket) and b.peers == peers}
    plan = make_plan(jobs, peers.size, loads=[sum(column) for column in zip(*loads.values(), strict=True)])
    where = ", ".join(map(str, sorted({number for _, number, _ in layouts})))
    peers.check_same(plan.digest(), f"the plan of parameter groups {where}")
    return [ShardedBucket(ways, groups, params, peers, plan, b, segments) for b in range(len(plan.buckets))]


def _rectangles(segments: list[Segment]) -> Iterator[tuple[Rectangle, list[Segment]]]:
    """Yield the rectangles of a parameter that may have different owners, with the segments in them.

    Each piece is a rectangle of its own, so that blocks of a large matrix find more owners; unless slices can't cut it.
    """
    slices = [segment.view.slices(segment.piece) for segment in segments]
    if len(segments) == 1 or (segments and None in slices):
        yield Rectangle.whole(segments[0].view.shape), segments
        return
    for segment, cut in zip(segments, slices, strict=True):
        assert cut is not None
        yield Rectangle(tuple(s.start for s in cut), tuple(s.stop - s.start for s in cut)), [segment]


def _job_of_bias(leader: Job, name: str, b: Tensor, layout: Layout, segments: Sequence[Segment]) -> Job:
    """Return the job of a bias, which goes along with its weight's: all of it, or the entries of one piece's rows."""
    rectangle = layout.whole
    if leader.rectangle != leader.layout.whole:
        rows, _ = segments[0].view.blocks[segments[0].piece]
        rectangle = Rectangle((rows.start,), (rows.stop - rows.start,))
        name = f"{name}.{segments[0].piece}"
    kind = leader.kind.replace(leader.kind.split()[0], str(b.dtype), 1)
    return Job(name, layout, rectangle, 0.0, 0, (b.dtype.itemsize, state_dtype(b).itemsize), kind, 0, leader.name)


def _job(rule: Rule, name: str, p: Tensor, layout: Layout, rectangle: Rectangle, segments: Sequence[Segment]) -> Job:
    shapes = [segment.shape for segment in segments]
    return Job(
        name=name if rectangle == layout.whole else f"{name}.{segments[0].piece}",
        layout=layout,
        rectangle=rectangle,
        cost=sum(b * work(rule, m, n).total for b, m, n in shapes),
        memory=sum(x.nbytes for segment in segments for x in state_alone(rule, segment, p, "meta").values()),
        itemsizes=(p.dtype.itemsize, state_dtype(p).itemsize),
        kind=f"{p.dtype} {p.device.type} {rule.name} {rule.layout[1:]}",
        factored=sum(b * (m + n) * rule.rank(m, n) for b, m, n in shapes),
    )
