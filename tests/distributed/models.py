"""A small model with a bit of everything, laid out over ranks in the usual ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from steepest import Optimizer
from steepest.rule import Elementwise
from steepest.rules import RULES

LAYOUTS = ("ddp", "fsdp", "hsdp", "tp", "fsdp+tp")


class Experts(nn.Module):
    """Stacked matrices, as mixtures of experts have them."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of all experts."""
        return torch.einsum("eoi,bi->bo", self.weight, x) / len(self.weight)


class Toy(nn.Module):
    """Matrices of even and uneven sizes, one with fewer rows than ranks, experts, norms, an embedding."""

    def __init__(self, experts: int = 4, hidden: int = 37, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 12)
        self.query = nn.Linear(12, 12, bias=False)
        self.key = nn.Linear(12, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, hidden)
        self.down = nn.Linear(hidden, 12)
        self.experts = Experts(experts, 12, 8)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, 3]``."""
        x = self.embed(tokens)
        x = x + self.query(x) * torch.sigmoid(self.key(x))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(self.experts(x))


def toy(dtype: torch.dtype = torch.float32, **options: Any) -> Toy:
    """Return a model that has the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(**options).to(dtype)


def laid_out(model: nn.Module, layout: str) -> nn.Module:
    """Lay the model out over all ranks; "fsdp+tp" and "hsdp" use a mesh of 2 x world/2."""
    world = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    two = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if layout == "hsdp":
        return fully_shard(model, mesh=two)
    tp = init_device_mesh("cpu", (world,)) if layout == "tp" else two["inner"]
    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "query": ColwiseParallel(output_layouts=Replicate()),
        "key": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, tp, plan)
    if layout == "fsdp+tp":
        fully_shard(model, mesh=two["outer"])
    return model


def bare(name: str) -> str:
    """Return a parameter's name without DDP's prefix."""
    return name.removeprefix("module.")


def grouped(model: nn.Module, rule: str, **options: Any) -> list[dict[str, Any]]:
    """Return groups: matrices under ``rule``, experts as a batch of matrices, all other parameters under AdamW.

    Under an elementwise rule all parameters are in one group.
    """
    own = {"rule": rule, "lr": 0.02, "weight_decay": 0.1, **options}
    if issubclass(RULES[rule], Elementwise):
        return [{"params": [(bare(name), p) for name, p in model.named_parameters()], **own}]
    matrices, experts, rest = [], [], []
    for name, p in model.named_parameters():
        name = bare(name)
        into = experts if name == "experts.weight" else matrices if p.dim() == 2 and name != "embed.weight" else rest
        into.append((name, p))
    return [{"params": matrices, **own}, {"params": experts, "merge_dims": False, **own}, {"params": rest, "lr": 0.01}]


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """Return a gradient that is the same in every process."""
    seed = sum(map(ord, name)) * 1000 + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inject(model: nn.Module, step: int, change: Callable[[str, Tensor], Tensor | None] = lambda _, g: g) -> None:
    """Give every parameter its shard of a made gradient, after ``change``, which may return None for no gradient."""
    for name, p in model.named_parameters():
        g = change(bare(name), gradient(bare(name), p.shape, step).to(p.dtype))
        if g is not None and isinstance(p, DTensor):
            g = scattered(g, p)
        p.grad = g


def scattered(x: Tensor, p: DTensor) -> Tensor:
    """Shard ``x``, which every rank has whole, as ``p`` is sharded, without communication."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    part = x[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))].contiguous()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return all whole weights; every rank must call it."""
    with torch.no_grad():
        return {
            bare(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def differing(model: nn.Module, other: nn.Module) -> list[str]:
    """Return the parameters in which two models differ in any bit."""
    mine, theirs = weights(model), weights(other)
    return [name for name, x in mine.items() if not torch.equal(x, theirs[name])]


def optimizer(model: nn.Module, rule: str, **options: Any) -> Optimizer:
    """Return one optimizer for a whole model, with a refresh in each step."""
    if "precondition_frequency" in RULES[rule].defaults():
        options = {"precondition_frequency": 1} | options
    return Optimizer(grouped(model, rule, **options), lr=0.01)
