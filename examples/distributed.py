"""Train the small GPT of the race on several processes: DDP, FSDP2, HSDP or tensor parallel.

    torchrun --nproc-per-node 4 examples/distributed.py --parallel fsdp --steps 100 --checkpoint runs/fsdp

On GPUs over NCCL where there are any, else on CPUs over gloo: the script is the same. Started again with the same
``--checkpoint``, with as many processes as you like and any ``--parallel``, it goes on from the last complete one. The
optimizer is made after the model has been wrapped, as always, and nothing else about it is special.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import steepest
from steepest.lab.workloads.stdlib import StandardLibrary


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--parallel", choices=("ddp", "fsdp", "hsdp", "tp"), default="fsdp")
    ask.add_argument("--optimizer", default="soap", help="any name that steepest.for_model takes")
    ask.add_argument("--lr", type=float, default=1e-2)
    ask.add_argument("--steps", type=int, default=100)
    ask.add_argument("--save-every", type=int, default=50)
    ask.add_argument("--checkpoint", type=Path, help="folder of checkpoints, to write and to resume from")
    asked = ask.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights on every rank
    workload = StandardLibrary()
    model = parallel(workload.model().to(device), asked.parallel, device)
    optimizer = steepest.for_model(model, asked.optimizer, lr=asked.lr)

    first = resume(model, optimizer, asked.checkpoint) if asked.checkpoint else 0
    ways, mine = (1, 0) if asked.parallel == "tp" else (world, rank)  # tensor-parallel ranks see the same batch
    for step in range(first, asked.steps):
        symbols, following = workload.batch(torch.Generator().manual_seed(step))
        batch = symbols.chunk(ways)[mine].to(device), following.chunk(ways)[mine].to(device)
        loss = workload.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
        if asked.checkpoint and (step + 1) % asked.save_every == 0:
            save(model, optimizer, asked.checkpoint / str(step + 1))
    dist.destroy_process_group()


def parallel(model: nn.Module, how: str, device: str) -> nn.Module:
    """The model on all ranks."""
    world = dist.get_world_size()
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "tp":
        mesh = init_device_mesh(device, (world,))
        for block in model.blocks:
            columns, rows = ("q", "k", "v", "up"), ("o", "down")
            plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
            parallelize_module(block, mesh, plan)
            block.heads //= world
        return model
    shape, names = ((world,), ("shard",)) if how == "fsdp" else ((2, world // 2), ("replicate", "shard"))
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Every rank writes what it has."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))


def resume(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the last complete checkpoint, which has a ``.metadata``, if there is one; the step to go on with."""
    complete = sorted(int(file.parent.name) for file in folder.glob("*/.metadata"))
    if not complete:
        return 0
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=str(folder / str(complete[-1])))
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return complete[-1]


if __name__ == "__main__":
    main()
    # A device mesh keeps gloo's threads after their group has been destroyed, and one that still clears up while Python
    # shuts down aborts the process (pytorch#190489). Everything has been written: leave without shutting down.
    sys.stdout.flush()
    os._exit(0)
