"""Processes that run functions by name, in one gloo group, until the tests are over."""

from __future__ import annotations

import gc
import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """A number of processes, which are started anew after a failure or a hang.

    Functions are run by their module and name, so they must be in a module in this folder.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes."""
        context = get_context("spawn")
        store = tempfile.mktemp(prefix="steepest-ranks-")
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def stop(self) -> None:
        """Kill them."""
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Return what ``function(*args)`` returns on each rank; raise with the traceback of the first that fails."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, args))
        results: dict[int, Any] = {}
        while len(results) < self.world:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results}
            ready = wait(list(waiting), timeout)
            if not ready:
                self.stop()
                raise AssertionError(f"ranks {sorted(waiting.values())} gave no answer in {timeout} s")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    ok, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, results[rank] = False, "the process died"
                if not ok:
                    self.stop()
                    raise AssertionError(f"rank {rank}: {results[rank]}")
        return [results[rank] for rank in range(self.world)]


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    for number in count():
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        # Each call has a group of its own: gloo's threads wake a hundred times a second, and every mesh makes groups.
        dist.init_process_group(
            "gloo", init_method=f"file://{store}-{number}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        dist.barrier()  # a rank that is done at once would leave while others still connect to it
        try:
            function = getattr(importlib.import_module(module), name)
            # An optimizer looks for DDP's modules among all live objects. Freezing hides the hundreds of thousands of
            # objects of the imported modules, because going through them would take most of a test's time.
            gc.freeze()
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.send(answer)
