"""What the ranks run in tests of a step. Every function is called on all ranks, and returns what a test looks at."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from models import differing, gradient, grouped, inject, laid_out, optimizer, scattered, toy, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from steepest import Optimizer
from steepest.exchange import layout as layouts
from steepest.exchange import mesh
from steepest.exchange.domain import Domain
from steepest.rules.parts import newton_schulz
from steepest.rules.soap import Soap


def same_as_one_process(
    layout: str, rule: str, dtype: torch.dtype, options: dict[str, Any], hidden: int = 37
) -> list[str]:
    """Four steps with made gradients; the parameters that then differ, in any bit, from one process's."""
    one, many = toy(dtype, hidden=hidden), laid_out(toy(dtype, hidden=hidden), layout)
    here, there = optimizer(one, rule, **options), optimizer(many, rule, **options)
    for step in range(4):
        for model, opt in ((one, here), (many, there)):
            inject(model, step)
            opt.step()
    return differing(many, one)


def trains_as_one_process(layout: str, rule: str) -> float:
    """Ten real steps, the batch cut among data-parallel ranks; the largest relative difference of a parameter.

    In float64, so that the order of a sum, which is all that differs, doesn't show. Torch's tensor parallelism takes
    even sizes only.
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


def with_missing(layout: str, rule: str, options: dict[str, Any] | None = None) -> list[str]:
    """In one step some ranks have no gradient for a matrix, and a norm: both sit that step out everywhere."""
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


def with_frozen(layout: str, rule: str) -> list[str]:
    """A matrix and a bias are frozen at first, and thaw; a group is added later."""
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
    """Some matrices in bfloat16, some in float32, on one optimizer."""
    models = [toy(), toy()]
    for model in models:
        model.up.to(torch.bfloat16)
        model.experts.to(torch.bfloat16)
    one = models[0]
    # FSDP2 wants one dtype a unit
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
    """A NaN in one corner of a matrix, of one expert and of a norm: differing parameters, skips here and there."""
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
    """With ``nonfinite="raise"`` and a NaN that one rank alone sees: what every rank says, and what has changed."""
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
    """What a group settles on if bfloat16 doesn't pay on one rank."""
    with mock.patch.object(newton_schulz, "bfloat16_pays", return_value=dist.get_rank() != rank):
        opt = Optimizer(laid_out(toy(), "fsdp").up.parameters(), rule="muon", lr=0.1)
    return str(opt.param_groups[0]["ns_dtype"])


def disagreement() -> str:
    """One rank plans with another option; what the constructor says."""
    model = laid_out(toy(), "fsdp")
    block_size = 8 if dist.get_rank() == 1 else 0
    try:
        optimizer(model, "soap", block_size=block_size)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def traffic(layout: str, rule: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the second step calls of torch.distributed, and what it sends, beside what its plans say."""
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
    shared = [lot for lot in opt._lots if isinstance(lot, mesh.Shared)]
    plans = {id(lot.plan): (lot.plan, lot.domain.me) for lot in shared}
    planned = sum(p.traffic().sent(me) for p, me in plans.values())
    lent = sum(p.lent()[me] for p, me in plans.values())
    lenders = sum(bool(lot.lent) for lot in shared)
    return {
        "calls": dict(calls),
        "buckets": len(shared),
        "lenders": lenders,
        "sent": sent,
        "planned": planned,
        "lent": lent,
    }


def lent_by_shape(shapes: list[tuple[int, int]], options: dict[str, Any]) -> list[tuple[int, int]]:
    """The shapes of which a lone matrix, whose owner lends a refresh, differs in any bit from one process's."""
    everyone = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for shape in shapes:
        here = nn.Parameter(gradient("weights", torch.Size(shape), 0))
        there = nn.Parameter(distribute_tensor(here.detach(), everyone, [Shard(0)], src_data_rank=None))
        one, many = (
            Optimizer([("w", p)], rule="soap", lr=0.02, precondition_frequency=1, refresh_async=True, **options)
            for p in (here, there)
        )
        assert any(lot.lent for lot in many._lots if isinstance(lot, mesh.Shared))
        for step in range(4):
            here.grad = gradient("w", here.shape, step)
            there.grad = scattered(here.grad, there)
            one.step()
            many.step()
        if not torch.equal(there.full_tensor(), here):
            found.append(shape)
    return found


class Tower(nn.Module):
    """The matrices of a GPT of 24 layers, small."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        self.layers = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes) for _ in range(24)
        )


def balance(rule: str) -> tuple[float, float]:
    """FLOPs that this rank's step takes, and the plan's forecast of them."""
    model = Tower()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    opt = Optimizer(model.parameters(), rule=rule, lr=0.01)
    inject(model, 0)
    opt.step()
    with FlopCounterMode(display=False) as counter:
        inject(model, 1)
        opt.step()
    lots = [lot for lot in opt._lots if isinstance(lot, mesh.Shared)]
    return float(counter.get_total_flops()), lots[0].plan.loads()[dist.get_rank()]


# Mutations: each breaks one thing, and must be seen.


def mutated(kind: str) -> list[str]:
    """The parameters that differ from one process's if something is broken."""
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
    """The owners of two matrices of one shape step each with the other's momentum."""
    for stack in opt._stacks:
        if stack.shape == (12, 12):
            stack.state["exp_avg"].copy_(stack.state["exp_avg"].flip(0) if stack.size > 1 else -stack.state["exp_avg"])
    return nullcontext()


def _shifted_rectangle(opt: Optimizer) -> Any:
    """Parts of gradients land a row off."""
    within = layouts.Rectangle.within

    def off(self: layouts.Rectangle, window: layouts.Rectangle) -> tuple[slice, ...]:
        rows, *rest = within(self, window)
        if self.start[0] > 0 and self.shape[0] > 1 and window.shape == (37, 12):
            rows = slice(rows.start - 1, rows.stop - 1)
        return (rows, *rest)

    return mock.patch.object(layouts.Rectangle, "within", off)


def _dropped_state(opt: Optimizer) -> Any:
    """A matrix loses its second moments, on whichever rank has them."""
    p = next(p for p in opt.state if tuple(p.shape) == (12, 12))
    opt.state[p]["exp_avg_sq"].to_local().zero_()
    return nullcontext()


def mutated_errands(kind: str) -> list[str]:
    """The parameters that differ if borrowers do something else than what the owner would have done itself."""
    one, many = toy(), laid_out(toy(), "fsdp")
    here, there = (optimizer(model, "soap", refresh_async=True) for model in (one, many))
    for step in range(4):
        inject(one, step)
        here.step()
        inject(many, step)
        with mock.patch.object(Soap, "solve", ERRANDS[kind]):
            there.step()
    return differing(many, one)


_solve = Soap.solve


def _order_lost(self: Soap, *needs: Tensor) -> tuple[Tensor, Tensor]:
    Q, order = _solve(self, *needs)
    return Q, order.flip(-1)


ERRANDS = {
    "none": _solve,
    "nothing done": lambda self, K, Q: (Q, torch.arange(Q.shape[-1]).expand(Q.shape[:-1])),
    "order lost": _order_lost,
}
MUTATIONS = {"state": _swapped_owners, "rectangle": _shifted_rectangle, "dropped": _dropped_state}


def outlives(layout: str) -> list[str]:
    """What of an optimizer's groups is still there after they have been destroyed, and the optimizer is gone."""
    model = laid_out(toy(), layout)
    opt = optimizer(model, "soap")
    inject(model, 0)
    opt.step()
    part = Domain.among([dist.get_rank()])
    unlike = Domain.over(dist.new_group(backend="cuda:gloo"))  # one that takes no tensors of the host
    assert unlike.host_group is unlike.host_group is not unlike.group
    assert part is Domain.among([dist.get_rank()])
    groups = {"all": dist.group.WORLD, "some": part.group, "the host's": unlike.host_group}
    seen = {name: weakref.ref(group) for name, group in groups.items()}
    del model, opt, part, unlike, groups
    dist.destroy_process_group()
    gc.collect()
    return [name for name, group in seen.items() if group() is not None]
