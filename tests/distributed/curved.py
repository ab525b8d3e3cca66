"""Functions that the ranks run in tests of K-FAC: each is called on all ranks, and returns what a test checks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

OPTIONS = {"lr": 0.5, "settle": 2, "statistics_frequency": 2, "precondition_frequency": 2}


class Net(nn.Module):
    """Layers with and without a bias, of sizes that no number of ranks divides; one is called twice."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3, groups=2)
        self.inner = nn.Linear(12, 7)
        self.twice = nn.Linear(7, 7, bias=False)
        self.head = nn.Linear(7, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, 3]`` for ``x [batch, 2, 5]``."""
        x = torch.tanh(self.convolution(x)).flatten(1)
        x = torch.tanh(self.inner(x))
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


def laid_out(model: nn.Module, layout: str) -> nn.Module:
    """Lay the model out over all ranks; "units" shards each layer by itself."""
    world = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    two = (2, world // 2)
    mesh = init_device_mesh(
        "cpu", two if layout == "hsdp" else (world,), mesh_dim_names=("a", "b")[: 1 + (layout == "hsdp")]
    )
    if layout == "units":
        for child in model.children():
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return inputs and classes that are the same in every process."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (size,), generator=generator)
