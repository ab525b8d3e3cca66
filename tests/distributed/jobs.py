"""Functions that the ranks run in tests of a step: each is called on all ranks, and returns what a test checks."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models import differing, grouped, inject, laid_out, optimizer, toy, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from steepest import Optimizer
from steepest.exchange import layout as layouts
from steepest.exchange.peers import Peers
from steepest.exchange.sharded import ShardedBucket
from steepest.rules.parts import newton_schulz


def same_as_one_process(
    layout: str, rule: str, dtype: torch.dtype, options: dict[str, Any], hidden: int = 37
) -> list[str]:
    """Take four steps with made gradients, and return the parameters that differ in any bit from one process."""
    one, many = toy(dtype, hidden=hidden), laid_out(toy(dtype, hidden=hidden), layout)
    here, there = optimizer(one, rule, **options), optimizer(many, rule, **options)
    for step in range(4):
        for model, opt in ((one, here), (many, there)):
            inject(model, step)
            opt.step()
    return differing(many, one)


def in_other_surroundings(layout: str) -> list[str]:
    """Construct, step, save and load under autocast, another default device and inference mode; return what differs."""

    def surrounded(work: Callable[[], Any]) -> Any:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            return work()

    one, many = toy(), laid_out(toy(), layout)
    here, there = optimizer(one, "soap"), surrounded(lambda: optimizer(many, "soap"))
    for step in range(4):
        for model in (one, many):
            inject(model, step)
        here.step()
        surrounded(there.step)
        surrounded(lambda: there.load_state_dict(there.state_dict()))
        surrounded(lambda: there.load_consolidated(there.consolidate()))
    return differing(many, one)


def trains_as_one_process(layout: str, rule: str) -> float:
    """Take ten real steps with the batch cut among ranks, and return the largest relative difference of a parameter.

    It is in float64, where the order of a sum, which alone differs, doesn't show. Torch's tensor parallelism takes even
    sizes only.
    """
    one = toy(torch.float64, hidden=40, vocabulary=40)
    many = laid_out(toy(torch.float64, hidden=40, vocabulary=40), layout)
    here, there = optimizer(one, rule), optimizer(many, rule)
    ways = {"tp": 1, "fsdp+tp": 2}.get(layout, dist.get_world_size())
    mine = dist.get_rank() * ways // dist.get_world_size()
    for step in range(10):
        tokens = torch.randint(40, (64,), generator=torch.Generator().manual_seed(step))
        for model, opt, batch in ((one, here, tokens), (many, there, tokens.chunk(ways)[mine])):
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
    pairs = zip(weights(one).values(), weights(many).values(), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def refusal(layout: str, rule: str, options: dict[str, Any]) -> str:
    """Return what is said where no optimizer can be made."""
    try:
        optimizer(laid_out(toy(), layout), rule, **options)
    except ValueError as error:
        return str(error)
    return ""


def with_missing(layout: str, rule: str, options: dict[str, Any] | None = None) -> list[str]:
    """Leave some ranks without a gradient for a matrix and a norm in one step, which both then sit out everywhere."""
    one, many = toy(), laid_out(toy(), layout)
    here, there = (optimizer(model, rule, **options or {}) for model in (one, many))
    absent = {"up.weight", "norm.weight"}
    lacks = dist.get_rank() >= dist.get_world_size() // 2
    for step in range(3):
        inject(one, step, lambda name, g, s=step: None if s == 1 and name in absent else g)
        inject(many, step, lambda name, g, s=step: None if s == 1 and lacks and name in absent else g)
        here.step()
        there.step()
    return differing(many, one)


def with_one_penalty(layout: str) -> list[str]:
    """Let weight decay be part of the gradient in one of two groups of matrices, which are stepped together."""
    models = toy(), laid_out(toy(), layout)
    for model in models:
        groups = grouped(model, "soap", merge_dims=False)
        groups[1]["weight_decay_method"] = "l2"
        opt = Optimizer(groups, lr=0.01)
        for step in range(2):
            inject(model, step)
            opt.step()
    return differing(models[1], models[0])


def with_frozen(layout: str, rule: str) -> list[str]:
    """Freeze a matrix and a bias at first, and let them thaw; add a group later."""
    one, many = toy(), laid_out(toy(), layout)
    late = {"key.weight", "down.bias"}
    for model in (one, many):
        for name, p in model.named_parameters():
            p.requires_grad = name.removeprefix("module.") not in late
        *groups, rest = grouped(model, rule)
        opt = Optimizer(groups, lr=0.01)
        for step in range(4):
            inject(model, step, lambda name, g, s=step: None if s < 2 and name in late else g)
            opt.step()
            if step == 0:
                opt.add_param_group(rest)
    return differing(many, one)


def with_mixed_dtypes(layout: str, rule: str) -> list[str]:
    """Step some matrices in bfloat16 and some in float32 by one optimizer."""
    models = [toy(), toy()]
    for model in models:
        model.up.to(torch.bfloat16)
        model.experts.to(torch.bfloat16)
    one = models[0]
    # FSDP2 needs one dtype in a unit
    many = models[1]
    units = [many.up, many.experts, many]
    flat = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "fsdp":
        for unit in units:
            fully_shard(unit, mesh=flat)
    else:
        many = laid_out(many, layout)
    here, there = optimizer(one, rule), optimizer(many, rule)
    for step in range(3):
        for model, opt in ((one, here), (many, there)):
            inject(model, step)
            opt.step()
    return differing(many, one)


def poison(layout: str, rule: str, options: dict[str, Any] | None = None) -> tuple[list[str], int, int]:
    """Put NaN into a matrix, an expert and a norm; return the differing parameters, and both counts of skips."""
    one, many = toy(), laid_out(toy(), layout)
    here, there = (optimizer(model, rule, **options or {}) for model in (one, many))
    for step in range(4):
        for model, opt in ((one, here), (many, there)):
            inject(model, step, _poisoned if step == 1 else lambda _, g: g)
            opt.step()
    return differing(many, one), here.skipped, there.skipped


def _poisoned(name: str, g: Tensor) -> Tensor:
    if name in ("up.weight", "norm.weight"):
        g[-1] = torch.nan
    if name == "experts.weight":
        g[2, 3, 4] = torch.inf
    return g


def refuses_nan(layout: str) -> tuple[str, list[str]]:
    """Return what every rank says to a NaN that one rank sees under ``nonfinite="raise"``, and what has changed."""
    model = laid_out(toy(), layout)
    opt = optimizer(model, "soap", nonfinite="raise")
    inject(model, 0, lambda name, g: _poisoned(name, g) if name == "up.weight" else g)
    before = laid_out(toy(), layout)
    try:
        opt.step()
    except FloatingPointError as error:
        return str(error), differing(model, before)
    return "nothing", []


def measured_by_one(rank: int | None) -> str:
    """Return the dtype that a group settles on if bfloat16 doesn't pay on one rank."""
    with mock.patch.object(newton_schulz, "bfloat16_pays", return_value=dist.get_rank() != rank):
        opt = Optimizer(laid_out(toy(), "fsdp").up.parameters(), rule="muon", lr=0.1)
    return str(opt.param_groups[0]["ns_dtype"])


def disagreement() -> str:
    """Let one rank plan with another option, and return what the constructor says."""
    model = laid_out(toy(), "fsdp")
    block_size = 8 if dist.get_rank() == 1 else 0
    try:
        optimizer(model, "soap", block_size=block_size)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def traffic(layout: str, rule: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the second step calls of torch.distributed, what it sends, and what its plans say that it sends."""
    model = laid_out(toy(), layout)
    opt = optimizer(model, rule, **options or {})
    for step in range(2):
        inject(model, step)
        if step == 0:
            opt.step()
    calls: Counter[str] = Counter()
    sent = 0
    exchanged = dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        calls["all_to_all_single"] += 1
        sent += x.numel() * x.element_size()
        return exchanged(out, x, *args, **kwargs)

    def noted(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    others = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast", "reduce_scatter")
    with mock.patch.object(dist, "all_to_all_single", counted):
        patches = [mock.patch.object(dist, name, noted(name)) for name in others]
        for patch in patches:
            patch.start()
        opt.step()
        mock.patch.stopall()
    shared = [bucket for bucket in opt._roster.buckets if isinstance(bucket, ShardedBucket)]
    plans = {id(bucket.plan): (bucket.plan, bucket.me) for bucket in shared}
    planned = sum(plan.traffic().sent(me) for plan, me in plans.values())
    return {"calls": dict(calls), "buckets": len(shared), "sent": sent, "planned": planned}


class Tower(nn.Module):
    """The matrices of a small GPT of 24 layers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        self.layers = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes) for _ in range(24)
        )


def balance(rule: str) -> tuple[float, float]:
    """Return the FLOPs of this rank's step, and the plan's prediction of them."""
    model = Tower()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    opt = Optimizer(model.parameters(), rule=rule, lr=0.01)
    inject(model, 0)
    opt.step()
    with FlopCounterMode(display=False) as counter:
        inject(model, 1)
        opt.step()
    plan = next(bucket.plan for bucket in opt._roster.buckets if isinstance(bucket, ShardedBucket))
    return float(counter.get_total_flops()), plan.loads()[dist.get_rank()]


# Mutations: each breaks one thing, and must be seen.


def mutated(kind: str) -> list[str]:
    """Return the parameters that differ from those of one process if something is broken."""
    one, many = toy(), laid_out(toy(), "fsdp")
    here, there = optimizer(one, "soap"), optimizer(many, "soap")
    for step in range(3):
        inject(one, step)
        here.step()
        inject(many, step)
        with MUTATIONS[kind](there):
            there.step()
    return differing(many, one)


def _swapped_owners(opt: Optimizer) -> Any:
    """Let the owners of two matrices of one shape step each with the other's momentum."""
    for stack in opt._stacks:
        if stack.shape == (12, 12):
            stack.state["exp_avg"].copy_(stack.state["exp_avg"].flip(0) if stack.size > 1 else -stack.state["exp_avg"])
    return nullcontext()


def _shifted_rectangle(opt: Optimizer) -> Any:
    """Put parts of gradients one row off."""
    within = layouts.Rectangle.within

    def off(self: layouts.Rectangle, outer: layouts.Rectangle) -> tuple[slice, ...]:
        rows, *rest = within(self, outer)
        if self.start[0] > 0 and self.shape[0] > 1 and outer.shape == (37, 12):
            rows = slice(rows.start - 1, rows.stop - 1)
        return (rows, *rest)

    return mock.patch.object(layouts.Rectangle, "within", off)


def _dropped_state(opt: Optimizer) -> Any:
    """Zero the second moments of a matrix on its owner."""
    p = next(p for p in opt.state if tuple(p.shape) == (12, 12))
    opt.state[p]["exp_avg_sq"].to_local().zero_()
    return nullcontext()


MUTATIONS = {"state": _swapped_owners, "rectangle": _shifted_rectangle, "dropped": _dropped_state}


def outlives(layout: str) -> list[str]:
    """Return the process groups that are alive after they have been destroyed and the optimizer is gone."""
    model = laid_out(toy(), layout)
    opt = optimizer(model, "soap")
    inject(model, 0)
    opt.step()
    part = Peers.among([dist.get_rank()])
    unlike = Peers.over(dist.new_group(backend="cuda:gloo"))  # a group that communicates no tensors of the host
    assert unlike.host_group is unlike.host_group is not unlike.group
    assert part is Peers.among([dist.get_rank()])
    groups = {"all": dist.group.WORLD, "some": part.group, "the host's": unlike.host_group}
    seen = {name: weakref.ref(group) for name, group in groups.items()}
    del model, opt, part, unlike, groups
    dist.destroy_process_group()
    gc.collect()
    return [name for name, group in seen.items() if group() is not None]
