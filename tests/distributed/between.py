"""Tests run this where only some ranks step a matrix, between matrices of all ranks: what ranks call and compute."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models import gradient, scattered
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from steepest import Optimizer


def _with_one_between(holders: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor], Optimizer, Optimizer]:
    """Make three groups of one matrix: the first and the last sharded over all ranks, the second over ``holders`` only.

    Returns the weights of one process and of these ranks, by name, and an optimizer of each.
    """
    everyone = init_device_mesh("cpu", (dist.get_world_size(),))
    some = DeviceMesh("cpu", holders)  # made by all ranks, also those that are not in it
    one, many = {}, {}
    for name, shape, on in (("wide", (40, 12), everyone), ("between", (9, 7), some), ("small", (16, 8), everyone)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        one[name] = nn.Parameter(W.clone())
        if on.size() > 1 and on.get_coordinate() is not None:
            many[name] = nn.Parameter(distribute_tensor(W, on, [Shard(0)], src_data_rank=None))
        elif on.get_coordinate() is not None:
            many[name] = nn.Parameter(W)
    here, there = (
        Optimizer(
            [{"params": [(name, p)]} for name, p in held.items()],
            rule="soap",
            lr=0.02,
            precondition_frequency=1,
        )
        for held in (one, many)
    )
    return one, many, here, there


def _step(params: dict[str, Tensor], opt: Optimizer, step: int) -> None:
    for name, p in params.items():
        g = gradient(name, p.shape, step)
        p.grad = scattered(g, p) if isinstance(p, DTensor) else g
    opt.step()


def calls(holders: list[int]) -> list[tuple[str, list[int], list[int]]]:
    """Return what this rank calls of the group of all ranks in three steps: the call, and bytes to and from each rank.

    No tensor travels, so ranks that call in different orders are told apart, and don't wait for each other.
    """
    _, many, _, opt = _with_one_between(holders)
    found: list[tuple[str, list[int], list[int]]] = []
    reduce, everyone = dist.all_reduce, dist.group.WORLD
    arrived = mock.Mock(spec=["wait"])

    def noted(out: Tensor, _: Tensor, received: list[int], sent: list[int], group: Any, async_op: bool) -> Any:
        if group is everyone:
            found.append(("all_to_all_single", sent, received))
        out.zero_()
        return arrived

    def reduced(x: Tensor, op: Any, group: Any) -> Any:
        if group is everyone:
            found.append(("all_reduce", [x.numel()], [x.numel()]))
        return reduce(x, op, group)

    with mock.patch.object(dist, "all_to_all_single", noted), mock.patch.object(dist, "all_reduce", reduced):
        for step in range(3):
            _step(many, opt, step)
    return found


def unlike_one_process(holders: list[int]) -> list[str]:
    """Take four steps, and return the weights of this rank that differ in any bit from those of one process."""
    one, many, here, there = _with_one_between(holders)
    for step in range(4):
        _step(one, here, step)
        _step(many, there, step)
    with torch.no_grad():
        return [
            name
            for name, p in many.items()
            if not torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, one[name])
        ]
