"""The process of one trial: ``python -m steepest.lab.race.worker TRIAL``, where TRIAL is a Python literal.

It writes one JSON object per line: ``{"done": 3, "train": 4.1, "validation": null}`` while it runs, then
``{"record": {...}}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

from steepest.lab.race.training import train
from steepest.lab.race.trial import Trial
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.workloads.workload import load_workload

PROGRESS_INTERVAL = 0.1  # seconds


def main() -> None:
    """Run the trial that the command line describes."""
    # What a workload prints goes to stderr, since stdout is for messages.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel)

    last = 0.0

    def progress(message: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_INTERVAL:
            last = time.monotonic()
            send(message)

    torch.set_num_threads(1)
    trial = Trial.from_literal(sys.argv[1])
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
