"""Functions that the ranks run in tests of K-FAC: each is called on all ranks, and returns what a test checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import differing, inject, weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import steepest
from steepest.curvature import Curvature

OPTIONS: dict[str, Any] = {"lr": 0.5, "settle": 2, "statistics_frequency": 2, "precondition_frequency": 2}


class Net(nn.Module):
    """Layers with and without a bias, of sizes that two doesn't divide; one is called twice."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3, groups=2)
        self.inner = nn.Linear(12, 7)
        self.norm = nn.LayerNorm(7)
        self.twice = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, shortly: bool = False) -> Tensor:
        """Return logits ``[batch, 3]`` for ``x [batch, 2, 5]``; ``shortly`` leaves a layer out."""
        x = torch.tanh(self.convolution(x)).flatten(1)
        x = self.norm(torch.tanh(self.inner(x)))
        if not shortly:
            x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return self.head(x)

    def middle(self, x: Tensor) -> Tensor:
        """Apply one layer twice."""
        return torch.tanh(self.twice(torch.tanh(self.twice(x))))


def net(dtype: torch.dtype = torch.float32, checkpointed: bool = False) -> Net:
    """Return a model that has the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(checkpointed).to(dtype)


def laid_out(model: nn.Module, layout: str, **options: Any) -> nn.Module:
    """Lay the model out over all ranks; "units" shards each layer by itself."""
    world = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model, **options)
    if layout == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b")))
    mesh = init_device_mesh("cpu", (world,))
    for child in model.children() if layout == "units" else ():
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step: int, dtype: torch.dtype = torch.float32, size: int = 16) -> tuple[Tensor, Tensor]:
    """Return inputs and classes that are the same in every process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (size,), generator=generator)


def mine(xs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return this rank's part of a batch."""
    return [x.chunk(dist.get_world_size())[dist.get_rank()] for x in xs]


def whole(p: Tensor) -> Tensor:
    """Return all of a tensor."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def distance(x: Tensor, y: Tensor) -> float:
    """Return the relative difference of two tensors."""
    return float((x - y).norm() / y.norm())


def states(opt: steepest.KFAC) -> dict[str, dict[str, Tensor]]:
    """Return A, B and the momentum of each weight by its name, on rank 0; every rank must call it."""
    whole = opt.consolidate()
    found = {}
    for group in whole["param_groups"] if whole else ():
        for number, name in zip(group["params"], group["param_names"], strict=True):
            entries = whole["state"][number]
            if "A" in entries:
                found[name.removeprefix("module.")] = {key: entries[key] for key in ("A", "B", "exp_avg")}
    return found


def apart(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> float:
    """Return the largest relative difference of factors, on rank 0."""
    assert len(expected) == 4
    assert found.keys() == expected.keys() or dist.get_rank()
    return max((distance(x[k], expected[name][k]) for name, x in found.items() for k in ("A", "B")), default=0.0)


def as_one_process(layout: str, dtype: torch.dtype, steps: int, checkpointed: bool = False) -> tuple[float, float]:
    """Train with a batch cut among ranks; return how far factors, and weights, are from those of one process."""
    one, many = net(dtype), laid_out(net(dtype, checkpointed), layout)
    here, there = steepest.KFAC(one, **OPTIONS), steepest.KFAC(many, **OPTIONS)
    for step in range(steps):
        for model, opt, (x, y) in ((one, here, batch(step, dtype)), (many, there, mine(batch(step, dtype)))):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    pairs = zip(weights(many).values(), weights(one).values(), strict=True)
    moved = max(distance(a, b) for a, b in pairs)
    return apart(
        states(there), {name: here.state[p] for name, p in one.named_parameters() if "A" in here.state[p]}
    ), moved


def averaged(layout: str, fisher: str, sizes: tuple[int, ...], checkpointed: bool = False) -> tuple[float, float]:
    """Take a step on parts of a batch of these sizes, and compare with what each rank captures and computes alone.

    Returns how far factors are from the means of the ranks' own, and gradients likewise.
    """
    dtype, rank = torch.float64, dist.get_rank()
    many, alone = laid_out(net(dtype, checkpointed), layout), net(dtype)
    opt, curvature = steepest.KFAC(many, fisher=fisher, **OPTIONS), Curvature(alone, fisher=fisher, rank=rank)
    curvature.listening = True
    x, y = (part.split(sizes)[rank] for part in batch(0, dtype, sum(sizes)))
    for model, sample in ((many, opt.sample), (alone, curvature.sample)):
        outputs = model(x)
        sample(outputs, "categorical")
        F.cross_entropy(outputs, y).backward()
    gradients = [
        distance(whole(p.grad), mean(q.grad)) for p, q in zip(many.parameters(), alone.parameters(), strict=True)
    ]
    captured = curvature.collect()
    layers = [(name, captured[p]) for name, p in alone.named_parameters() if p in captured]
    expected = {name: {"A": mean(x.A).squeeze(0), "B": mean(x.B).squeeze(0)} for name, x in layers}
    opt.step()
    return apart(states(opt), expected), max(gradients)


def mean(x: Tensor) -> Tensor:
    """Return the mean of all ranks' tensors."""
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def train(model: nn.Module, opt: steepest.KFAC, first: int, last: int, fisher: str = "empirical") -> None:
    """Take steps ``first`` to ``last - 1``."""
    for step in range(first, last):
        x, y = mine(batch(step))
        opt.zero_grad()
        outputs = model(x)
        opt.sample(outputs, "categorical")
        F.cross_entropy(outputs, y).backward()
        opt.step()


def poisoned(layout: str) -> tuple[list[str], bool, bool]:
    """Let one rank's batch be NaN in a step; return what that changes, and whether training goes on."""
    model = laid_out(net(), layout)
    opt = steepest.KFAC(model, **OPTIONS | {"statistics_frequency": 1})
    train(model, opt, 0, 3)
    before, factors = weights(model), states(opt)
    x, y = mine(batch(3))
    if dist.get_rank() == 0:
        x[0, 0, 0] = torch.nan
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    moved = [name for name, p in weights(model).items() if not torch.equal(p, before[name])]
    after = states(opt)
    same = all(torch.equal(x, after[name][key]) for name, entries in factors.items() for key, x in entries.items())
    train(model, opt, 4, 6)
    goes_on = all(not torch.equal(p, before[name]) and bool(p.isfinite().all()) for name, p in weights(model).items())
    return moved, same, goes_on


def resumes(layout: str, fisher: str, path: str) -> list[str]:
    """Save after three steps; return what differs after two more, in this run and in one that loads the checkpoint."""
    model = laid_out(net(), layout)
    opt = steepest.KFAC(model, fisher=fisher, **OPTIONS)
    train(model, opt, 0, 3, fisher)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
    dcp.save(saved, checkpoint_id=path)
    train(model, opt, 3, 5, fisher)

    again = laid_out(net(), layout)
    other = steepest.KFAC(again, fisher=fisher, **OPTIONS)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(again, other), strict=True))
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(again, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(again, other, 3, 5, fisher)
    return differing(again, model)


def consolidated(layout: str) -> tuple[bool, float]:
    """Load consolidated state into one process; return whether it is the same, and how far apart both go on."""
    model = laid_out(net(torch.float64), layout)
    opt = steepest.KFAC(model, **OPTIONS)

    def step(model: nn.Module, opt: steepest.KFAC, data: Iterator[Tensor] | list[Tensor]) -> None:
        x, y = data
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    for number in range(3):
        step(model, opt, mine(batch(number, torch.float64)))
    shared = [opt.consolidate()]
    dist.broadcast_object_list(shared)
    one = net(torch.float64)
    one.load_state_dict(weights(model))
    alone = steepest.KFAC(one, **OPTIONS)
    alone.load_state_dict(shared[0])
    state = alone.state_dict()["state"]
    same = all(
        torch.equal(x, shared[0]["state"][i][name]) for i, entries in state.items() for name, x in entries.items()
    )
    for number in range(3, 5):
        step(model, opt, mine(batch(number, torch.float64)))
        step(one, alone, list(batch(number, torch.float64)))
    pairs = zip(weights(model).values(), weights(one).values(), strict=True)
    return same, max(distance(a, b) for a, b in pairs)


def saved(layout: str, path: str) -> dict[str, dict[str, Tensor]]:
    """Save a checkpoint after three steps, and return the state on rank 0."""
    model = laid_out(net(), layout)
    opt = steepest.KFAC(model, **OPTIONS)
    train(model, opt, 0, 3)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True)), checkpoint_id=path)
    return states(opt)


def loaded(layout: str, path: str) -> dict[str, dict[str, Tensor]]:
    """Load that checkpoint in another layout, return the state on rank 0, and train on."""
    model = laid_out(net(), layout)
    opt = steepest.KFAC(model, **OPTIONS)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = states(opt)
    train(model, opt, 3, 4)
    assert {int(s["clock"].to_local().sum()) for s in opt.state.values() if "clock" in s} <= {0, 4, 8}
    return found


def left_out() -> tuple[float, float]:
    """Leave a layer out on all ranks but the first; return how far its A and B are from what they should be."""
    model = laid_out(net(torch.float64), "ddp", find_unused_parameters=True)
    opt = steepest.KFAC(model, **OPTIONS)
    alone, curvature = (one := net(torch.float64)), Curvature(one)
    curvature.listening = True
    x, y = mine(batch(0, torch.float64))
    F.cross_entropy(alone(x), y).backward()
    captured = curvature.collect()[alone.twice.weight]
    opt.zero_grad()
    F.cross_entropy(model(x, shortly=dist.get_rank() > 0), y).backward()
    opt.step()
    found = states(opt).get("twice.weight")
    for step in range(1, 3):  # the first rank leaves it out, too
        opt.zero_grad()
        x, y = mine(batch(step, torch.float64))
        F.cross_entropy(model(x, shortly=step == 2 or dist.get_rank() == 0), y).backward()
        opt.step()
    if found is None:
        return 0.0, 0.0
    return distance(found["A"], captured.A[0]), distance(found["B"], captured.B[0] / dist.get_world_size())


def accumulated(layout: str) -> tuple[float, float]:
    """Accumulate over two micro-batches, of which only the last is averaged; return distances as `as_one_process`."""
    one, many = net(torch.float64), laid_out(net(torch.float64), layout)
    here, there = steepest.KFAC(one, **OPTIONS), steepest.KFAC(many, **OPTIONS)
    for step in range(3):
        for model, opt in ((one, here), (many, there)):
            opt.zero_grad()
            for number in range(2):
                x, y = whole_batch = batch(2 * step + number, torch.float64)
                if model is many:
                    x, y = mine(whole_batch)
                with _unsynchronized(model) if model is many and number == 0 else nullcontext():
                    if layout != "ddp" and model is many:
                        model.set_requires_gradient_sync(number == 1)
                    (F.cross_entropy(model(x), y) / 2).backward()
            opt.step()
    moved = max(distance(a, b) for a, b in zip(weights(many).values(), weights(one).values(), strict=True))
    return apart(
        states(there), {name: here.state[p] for name, p in one.named_parameters() if "A" in here.state[p]}
    ), moved


def _unsynchronized(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def listens(poison_first: bool) -> tuple[list[bool], list[list[int]], list[list[int]]]:
    """Return in which steps statistics are captured; each rank knows only of its own matrices that they wait.

    A layer thaws in the step of number 5; or the first batch is NaN, so that no layer gets an update from it. Then the
    groups count from step 2 on anew, every fourth step; the group of a frozen layer goes on counting from step 0.

    Returns:
        For each step whether statistics are captured, and for each exchange the bytes to and from each rank.
    """
    sent, received = [], []
    exchanged = dist.all_to_all_single

    def noted(out: Tensor, x: Tensor, incoming: list[int], outgoing: list[int], **options: Any) -> Any:
        sent.append(outgoing)
        received.append(incoming)
        return exchanged(out, x, incoming, outgoing, **options)

    with mock.patch.object(dist, "all_to_all_single", noted):
        return _listens(poison_first), sent, received


def _listens(poison_first: bool) -> list[bool]:
    inner = net()
    inner.twice.weight.requires_grad_(False)
    model = laid_out(inner, "ddp")
    opt = steepest.KFAC(inner, **OPTIONS | {"settle": 0, "statistics_frequency": 4})
    opt.add_param_group({"params": [("twice.weight", inner.twice.weight)]})
    seen = []
    for step in range(8):
        seen.append(opt.wants_statistics)
        x, y = mine(batch(step))
        if step == 5 and not poison_first:
            inner.twice.weight.requires_grad_(True)
            model = laid_out(inner, "ddp")
        opt.zero_grad()
        F.cross_entropy(model(x * torch.nan if poison_first and step == 0 else x), y).backward()
        opt.step()
    assert all(bool(p.isfinite().all()) for p in inner.parameters())
    return seen


def refused(what: str) -> str:
    """Return what an optimizer says to a layout that it can't be used in."""
    model = net()
    if what.startswith("tensor parallel"):
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"inner": ColwiseParallel()})
    elif what == "static graph":
        model = laid_out(model, "ddp", static_graph=True)
    elif what == "apart":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, ignored_params={model.inner.bias})
    elif what == "ekfac":
        model = laid_out(model, "fsdp")
    before = [whole(p).clone() for p in model.parameters()]
    try:
        if what == "wrapped later":
            opt = steepest.KFAC(model)
            train(laid_out(model, "ddp"), opt, 0, 1)
        elif what == "not called":
            model = laid_out(model, "fsdp")
            opt = steepest.KFAC(model, **OPTIONS)
            inject(model, 0)
            opt.step()
        else:
            kind = steepest.EKFAC if what == "ekfac" else steepest.KFAC
            kind(model, fisher="empirical" if what == "tensor parallel" else "sampled")
    except (ValueError, RuntimeError) as error:
        assert all(map(torch.equal, before, [whole(p) for p in model.parameters()]))
        return str(error)
    return "nothing"
