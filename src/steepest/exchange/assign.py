"""Which rank steps which matrices: the parameters of a group become lots.

Most are plain tensors of one process, and `Here`. DTensors (FSDP2, HSDP, tensor parallel) and what DDP replicates are
shared out among the ranks that hold parts, by a plan that every rank makes for itself; all compare theirs at once.
Stacked experts of which every rank has whole matrices stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from steepest.exchange.layout import Layout, Rectangle
from steepest.exchange.lending import offers
from steepest.exchange.local import Here
from steepest.exchange.lot import Lot
from steepest.exchange.placement import is_shared, local
from steepest.exchange.plan import Job, make_plan
from steepest.rule import Rule
from steepest.stack.names import parameter_name
from steepest.stack.stack import Seat, Stack, lay_out, loose, state_dtype

if TYPE_CHECKING:
    from steepest.exchange.domain import Domain


def share(
    rule: Rule,
    number: int,
    group: Mapping[str, Any],
    indices: Sequence[int],
    lots: Sequence[Lot],
    homes: Mapping[Tensor, Domain],
) -> list[Lot]:
    """Lots for the parameters at ``indices`` of group ``number``, beside the ``lots`` that there are already.

    ``homes`` are the parameters' `domains`, where they have one.

    Raises:
        RuntimeError: if the ranks that hold a parameter plan differently, since their optimizers are not of the same
            parameters with the same options. Raised on all of them.
    """
    here: dict[tuple[Domain | None, int], list[tuple[Seat, Tensor]]] = {}  # by domain and the number of the replica
    apart: dict[Domain, list[tuple[int, Layout]]] = {}
    for index in indices:
        p = group["params"][index]
        domain = homes.get(p)
        layout = None if domain is None else _layout(p, domain)
        if domain is None or layout is None:
            here.setdefault((None, 0), []).extend((seat, local(p)) for seat in loose(index, local(p), group))
        elif _holds_whole_matrices(layout, group):
            above = layout.parts[domain.me].start[0] * math.prod(p.shape[1:-2])
            place = domain, layout.replica(domain.me)
            here.setdefault(place, []).extend((seat, local(p)) for seat in loose(index, local(p), group, above))
        else:
            apart.setdefault(domain, []).append((index, layout))
    found: list[Lot] = []
    for (home, replica), pieces in here.items():
        found += [Here(number, stack, group["params"], home, replica) for stack in lay_out(rule, number, pieces)]
    for home, layouts in apart.items():
        found += _shared(rule, number, group, home, layouts, lots)
    return found


def domains(params: Sequence[Tensor]) -> list[Domain | None]:
    """For each parameter the ranks that hold parts or replicas of it; None where no other rank does."""
    if not (dist.is_available() and dist.is_initialized()):
        return [None] * len(params)
    from steepest.exchange import compat
    from steepest.exchange.domain import Domain

    replicated = compat.replicated()
    found: list[Domain | None] = []
    for p in params:
        domain = None
        if isinstance(p, compat.DTensor):
            domain = Domain.among(p.device_mesh.mesh.flatten().tolist())
        elif p in replicated:
            domain = Domain.over(replicated[p])
        found.append(domain if domain is not None and domain.size > 1 else None)
    return found


def held_gradient(p: Tensor) -> Tensor:
    """The part of p's gradient that lies where this rank's part of ``p`` lies; nothing if it holds nothing of it."""
    if p.grad is None:
        return torch.zeros_like(local(p))
    if is_shared(p) and p.grad.placements != p.placements:  # type: ignore[attr-defined]
        return local(p.grad.redistribute(placements=p.placements))  # type: ignore[attr-defined]
    return local(p.grad)


def _layout(p: Tensor, domain: Domain) -> Layout:
    from steepest.exchange import compat

    if not isinstance(p, compat.DTensor):
        return Layout.replicated(p.shape, domain.size)
    return Layout(tuple(p.shape), tuple(Rectangle(*box) for box in compat.boxes(p, domain.ranks)))


def _holds_whole_matrices(layout: Layout, group: Mapping[str, Any]) -> bool:
    """Whether a parameter is a stack of matrices, as experts are, of which every rank has some whole ones."""
    stacked = len(layout.shape) > 2 and not group["merge_dims"] and group["heads"] == 1
    cut = len(set(layout.parts)) > 1
    return stacked and cut and all(part.shape[1:] == layout.shape[1:] and not part.empty for part in layout.parts)


def _shared(
    rule: Rule,
    number: int,
    group: Mapping[str, Any],
    domain: Domain,
    layouts: Sequence[tuple[int, Layout]],
    lots: Sequence[Lot],
) -> list[Lot]:
    from steepest.exchange.mesh import Shared

    jobs: list[Job] = []
    seats: list[list[Seat]] = []
    for index, layout in layouts:
        for window, cut in _cuts(index, group):
            jobs.append(_job(rule, number, group, layout, window, cut))
            seats.append(cut)
    busy = {id(lot.plan): lot.plan.loads() for lot in lots if isinstance(lot, Shared) and lot.domain == domain}
    plan = make_plan(jobs, domain.size, loads=[sum(loads) for loads in zip(*busy.values(), strict=True)])
    domain.check_same(plan.digest(), f"the plan of parameter group {number}")
    return [Shared(rule, number, group, domain, plan, bucket, seats) for bucket in range(len(plan.buckets))]


def _cuts(index: int, group: Mapping[str, Any]) -> Iterator[tuple[Rectangle, list[Seat]]]:
    """The windows of a parameter that may have different owners, with the pieces in them.

    Each piece goes its own way, so that blocks of a large matrix find more owners; unless they are no rectangles.
    """
    p = group["params"][index]
    seats = loose(index, p, group)
    boxes = [seat.view.box(seat.piece) for seat in seats]
    if len(seats) < 2 or None in boxes:
        yield Rectangle.whole(p.shape), seats
        return
    for seat, box in zip(seats, boxes, strict=True):
        assert box is not None
        yield Rectangle(tuple(s.start for s in box), tuple(s.stop - s.start for s in box)), [seat]


def _job(
    rule: Rule, number: int, group: Mapping[str, Any], layout: Layout, window: Rectangle, seats: Sequence[Seat]
) -> Job:
    p = group["params"][seats[0].index]
    name = parameter_name(group, number, seats[0].index)
    shapes = [seat.view.pieces[seat.piece] for seat in seats]
    return Job(
        name=name if window == layout.whole else f"{name}.{seats[0].piece}",
        layout=layout,
        window=window,
        cost=sum(b * rule.flops(m, n) for b, m, n in shapes),
        memory=sum(Stack.blank(rule, number, seat, p).nbytes for seat in seats),
        itemsizes=(p.dtype.itemsize, state_dtype(p).itemsize),
        bucket=f"{p.dtype} {p.device.type}",
        factored=sum(b * (m + n) * rule.rank(m, n) for b, m, n in shapes),
        errands=offers(rule, shapes, state_dtype(p).itemsize),
    )
