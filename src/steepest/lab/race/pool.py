"""The pool of worker processes: trials run side by side, each in a fresh process with one thread.

Each trial has a process of its own, so its peak memory is its own, nothing that it does reaches the next trial, and a
process that is killed fails one trial only; a `concurrent.futures.ProcessPoolExecutor` would fail all that are left.
The processes have sessions of their own: Ctrl-C reaches only the race, which then stops them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO, Any, Protocol

from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.errors import BadInput, one_line

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LONGEST_LINE = 2**30
"""Limit to the bytes of a record."""


class Listener(Protocol):
    """What is told how the trials of a race go."""

    def skipped(self, trial: Trial) -> None:
        """The trial was run before."""

    def started(self, trial: Trial) -> None:
        """A process runs the trial now."""

    def progress(self, trial: Trial, step: int, train: float, validation: float | None) -> None:
        """The trial has come to this step, with these last losses."""

    def finished(self, run: Run) -> None:
        """The trial has ended with a record."""

    def failed(self, trial: Trial, reason: str) -> None:
        """The trial has ended without a record."""


class TrialFailed(Exception):
    """A trial's process ended with an error instead of a record."""


class Pool:
    """Up to ``workers`` processes, each with one trial."""

    def __init__(self, workers: int, listener: Listener) -> None:
        self.workers = workers
        self.listener = listener

    def run(self, trials: Iterable[Trial], done: Callable[[Run], None], failed: Callable[[Trial, str], None]) -> None:
        """Run the trials in order, and call back as each ends. An exception, also by Ctrl-C, stops all processes."""

        async def run(trial: Trial, slots: asyncio.Semaphore) -> None:
            async with slots:
                try:
                    record = await self._run(trial)
                except TrialFailed as error:
                    failed(trial, str(error))
                except OSError as error:  # no room for a temporary file, no memory for a process
                    raise BadInput(f"can't start a run: {one_line(error)}; finished runs are kept") from error
                else:
                    done(Run(trial, record))

        async def run_all() -> None:
            slots = asyncio.Semaphore(self.workers)
            async with asyncio.TaskGroup() as tasks:
                for trial in trials:
                    tasks.create_task(run(trial, slots))

        try:
            asyncio.run(run_all())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _run(self, trial: Trial) -> Record:
        """Return the record of a trial that runs in a process of its own."""
        with tempfile.TemporaryFile("w+") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "steepest.lab.race.worker", trial.literal()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
                limit=LONGEST_LINE,
            )
            self.listener.started(trial)
            try:
                return await self._listen(process, trial, stderr)
            finally:
                with suppress(ProcessLookupError):  # it may have ended
                    process.terminate()
                await process.wait()

    async def _listen(self, process: asyncio.subprocess.Process, trial: Trial, stderr: IO[str]) -> Record:
        """Pass the trial's progress on until its record comes."""
        assert process.stdout is not None
        async for line in process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "record" in message:
                return Record(**message["record"])
            if "error" in message:
                raise TrialFailed(message["error"])
            self.listener.progress(trial, **message)
        stderr.seek(0)
        complaints = stderr.read().strip().splitlines()
        raise TrialFailed(complaints[-1] if complaints else f"its process ended with status {await process.wait()}")
