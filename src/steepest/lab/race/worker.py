"""A worker of the pool: ``python -m steepest.lab.race.worker`` reads trials from stdin, one Python literal per line.

For each it writes JSON objects, one per line: ``{"done": 3, "train": 4.1, "validation": null}`` while it trains, then
``{"record": {...}}`` or ``{"error": "..."}``, and in the end ``{"status": 0}``, the exit status of the trial's process.

That process is a fork of the worker, which has imported what trials need, since that takes as long as a short trial.
Where forks are not safe, the worker trains one trial itself and ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from steepest.lab.race.training import train
from steepest.lab.race.trial import Trial
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.workloads.workload import load_workload

PROGRESS_INTERVAL = 0.1  # seconds
SLOW_IMPORTS = ("torch._dynamo", "sklearn.datasets")
"""What the first step of an optimizer, and most of the workloads, import."""


def main() -> None:
    """Run the trials that come on stdin, until it is closed."""
    # A workload that reads gets nothing, and what it prints goes to stderr: stdin is for trials, stdout for messages.
    trials, channel = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel)

    torch.set_num_threads(1)
    forks = can_fork()
    if forks:
        for name in SLOW_IMPORTS:
            with suppress(ImportError):
                importlib.import_module(name)
    for line in trials:
        if not forks:
            return run(line, send)
        if (child := os.fork()) == 0:
            try:
                run(line, send)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)  # its record is sent: there is no need for a tidy end
        send({"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})


def can_fork() -> bool:
    """Return whether a process may go on as two: frameworks of macOS may not, and CUDA may not once it was used."""
    return sys.platform == "linux" and not torch.cuda.device_count()


def run(literal: str, send: Callable[[dict[str, Any]], None]) -> None:
    """Run the trial that a line describes, and send its progress and its record."""
    last = 0.0

    def progress(message: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL:
            last = time.monotonic()
            send(message)

    trial = Trial.from_literal(literal)
    try:
        record = train(trial, load_workload(trial.workload), progress)
    except BrokenPipeError:  # the race has ended
        return
    except Exception as error:
        send({"error": str(error) if isinstance(error, BadInput) else one_line(error)})
    else:
        send({"record": record.as_json()})


if __name__ == "__main__":
    main()
