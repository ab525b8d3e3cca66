"""All uses of torch.distributed's private parts.

There are four: which shard of a DTensor each rank holds (`shards`), which parameters DDP replicates (`replicated`), how
distributed checkpoints are shown a tensor that lives on one rank (`Owned`), and a mesh of that one rank.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor as DTensor
from torch.distributed.tensor import Replicate
from torch.nn.parallel import DistributedDataParallel

from steepest.exchange.layout import Rectangle

try:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
except ImportError as error:
    raise ImportError(f"steepest can't read the layout of DTensors in torch {torch.__version__}: {error}") from error

REMEDY = (
    "use torch.distributed.checkpoint (dcp.save with get_optimizer_state_dict): it writes every rank's part, and "
    "loads on any number of ranks; or optimizer.consolidate(), which every rank calls: rank 0 gets all of it"
)


def shards(x: DTensor, ranks: Sequence[int]) -> tuple[Rectangle, ...]:
    """Return the shard of ``x`` that each rank holds, also with FSDP2 and tensor parallelism on one dimension."""
    mesh = x.device_mesh.mesh
    at = {int(rank): index for index, rank in enumerate(mesh.flatten().tolist())}
    found = []
    for rank in ranks:
        with torch.device("cpu"):  # torch computes places on the default device, wherever that is
            coordinate = [int(i) for i in torch.unravel_index(torch.tensor(at[rank]), mesh.shape)]
            shape, start = _compute_local_shape_and_global_offset(x.shape, mesh.shape, coordinate, x.placements)
        found.append(Rectangle(tuple(start), tuple(shape)))
    return tuple(found)


def own_shard(x: Tensor) -> Rectangle:
    """Return the shard of the DTensor ``x`` that this rank holds."""
    assert isinstance(x, DTensor)
    return shards(x, [dist.get_rank()])[0]


def replicated() -> dict[Tensor, dist.ProcessGroup]:
    """Return the parameters that a `DistributedDataParallel` module replicates, each with its process group.

    DDP leaves no mark on a parameter, so its modules are looked up among all live objects. An optimizer that is made
    before its model is wrapped finds nothing, and then steps every matrix on every rank, which is slower and gives the
    same result. So does an optimizer that is made after `gc.freeze`, which hides objects from this search.

    What a `ZeroRedundancyOptimizer` has is left out: it gives each rank's optimizer some of the parameters, and sends
    the weights on.
    """
    found: dict[Tensor, dist.ProcessGroup] = {}
    divided: set[Tensor] = set()
    zero = getattr(sys.modules.get("torch.distributed.optim"), "ZeroRedundancyOptimizer", ())  # slow to import
    for thing in gc.get_objects():
        if issubclass(type(thing), (DistributedDataParallel, zero)):
            if isinstance(thing, DistributedDataParallel):
                found |= dict.fromkeys(thing.parameters(), thing.process_group)
            else:
                divided |= {p for group in thing.param_groups for p in group["params"]}
    return {p: group for p, group in found.items() if p not in divided}


def held_by_others(params: Iterable[Tensor]) -> set[Tensor]:
    """Return the parameters that other ranks hold too, replicated by DDP or as DTensors."""
    groups = replicated()
    return {
        p
        for p in params
        if (p.device_mesh.size() if isinstance(p, DTensor) else dist.get_world_size(groups[p]) if p in groups else 1)
        > 1
    }


def static_graphs() -> set[Tensor]:
    """Return the parameters whose `DistributedDataParallel` module was made with ``static_graph=True``."""
    modules = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel) and x.static_graph]
    return {p for module in modules for p in module.parameters()}


def tensor_parallel(params: Iterable[Tensor]) -> set[Tensor]:
    """Return the parameters of which a module sees its rank's shard, and not the whole as under FSDP2 and HSDP.

    These shard the last dimension of their mesh, and replicate the others.
    """
    cut = {p for p in params if isinstance(p, DTensor) and p.device_mesh.size() > 1}
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    modules = [x for x in gc.get_objects() if issubclass(type(x), kind)] if cut else []
    gathered = {p for module in modules for p in module.parameters()}
    return {p for p in cut if p not in gathered or not all(x.is_replicate() for x in p.placements[:-1])}


class Owned(DTensor):
    """A tensor that lives whole on one rank, and is an empty shard on all others.

    Distributed checkpoints write it once, and read it wherever its owner is by then. Operations that would take one
    rank's shard for the whole tensor raise: pickling (``torch.save``), and gathering by ``full_state_dict=True``.
    """

    @classmethod
    def wrap(cls, x: Tensor | None, owner: int, like: Tensor, device: str) -> Owned:
        """Wrap ``x``, which is None except on ``owner``, a rank of the world; ``like`` has the whole's shape and dtype.

        ``device`` is the type of the device that holds the tensor.
        """
        mesh = _mesh_of(device, owner)
        meta = torch.empty(like.shape, dtype=like.dtype, device="meta")
        spec = DTensorSpec(mesh, (Replicate(),), tensor_meta=TensorMeta(meta.shape, meta.stride(), like.dtype))
        local = torch.zeros(0, dtype=like.dtype, device=device) if x is None else x
        return cls(local, spec, requires_grad=False)

    @property
    def owner(self) -> int:
        """Return the rank of the world that has the tensor."""
        return int(self.device_mesh.mesh.item())

    def clone(self, *, memory_format: torch.memory_format = torch.preserve_format) -> Owned:  # type: ignore[override]
        """Return a copy on the same rank."""
        local = self.to_local()
        mine = local.clone(memory_format=memory_format) if self.owner == dist.get_rank() else None
        return Owned.wrap(mine, self.owner, self, local.device.type)

    def __deepcopy__(self, memo: dict[int, Any]) -> Owned:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(f"this process has only its part of the optimizer's state and can't save it alone: {REMEDY}")

    def redistribute(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, because redistributing would lose the state that other ranks have."""
        raise RuntimeError(f"full_state_dict=True would lose the state that other ranks have: {REMEDY}")

    def full_tensor(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, because gathering would lose the state that other ranks have."""
        self.redistribute()


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """Return ``x``, which has a row for each row of this rank's shard of ``p``, as a shard of a DTensor like ``p``."""
    assert isinstance(p, DTensor)
    mesh = p.device_mesh
    if x.device.type != mesh.device_type:
        mesh = DeviceMesh(x.device.type, mesh.mesh, _init_backend=False)
    whole = torch.empty(p.shape[0], *x.shape[1:], device="meta")
    shard: Tensor = DTensor.from_local(x, mesh, p.placements, run_check=False, shape=whole.shape, stride=whole.stride())
    return shard


@cache
def _mesh_of(device_type: str, rank: int) -> DeviceMesh:
    """Return the mesh of one rank; making one takes about a millisecond."""
    return DeviceMesh(device_type, [rank], _init_backend=False)
