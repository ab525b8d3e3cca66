"""Train two ranks that save every second step and resume from the last complete checkpoint; one may be killed.

    python crash.py FOLDER "undisturbed" | "killed in a step" | "killed in a save"

The rank is killed once; when the script is run again, it resumes. The weights at the end are in FOLDER/end.pt.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from models import inject, laid_out, optimizer, toy, weights
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from steepest.exchange.sharded import ShardedBucket

STEPS = 8


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    mp.spawn(train, (folder, how), nprocs=2)


def train(rank: int, folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    model = laid_out(toy(), "fsdp")
    opt = optimizer(model, "soap")
    doomed = rank == 1 and how != "undisturbed" and not (folder / "killed").exists()

    complete = sorted(int(path.name) for path in folder.iterdir() if (path / ".metadata").exists())
    if complete:
        saved = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.load(saved, checkpoint_id=str(folder / str(complete[-1])))
        set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    for step in range(complete[-1] if complete else 0, STEPS):
        inject(model, step)
        kill = doomed and how.endswith("step") and step == 5
        with mock.patch.object(ShardedBucket, "scatter", die(folder)) if kill else nullcontext():
            opt.step()
        if step % 2:
            saved = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
            kill = doomed and how.endswith("save") and step == 3
            with mock.patch.object(dcp.FileSystemWriter, "write_data", die(folder)) if kill else nullcontext():
                dcp.save(saved, checkpoint_id=str(folder / str(step + 1)))
    end = weights(model)
    if rank == 0:
        torch.save(end, folder / "end.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads, which FSDP keeps, may abort Python while it shuts down (pytorch#190489)


def die(folder: Path) -> Callable[..., None]:
    """Return a function that kills its process, once."""

    def kill(*_: object, **__: object) -> None:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    return kill


if __name__ == "__main__":
    main()
