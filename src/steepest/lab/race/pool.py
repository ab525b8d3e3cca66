"""The pool of worker processes: trials run side by side, each in a fresh process with one thread.

Each trial has a process of its own, so its peak memory is its own, nothing that it does reaches the next trial, and a
process that is killed fails one trial only; a `concurrent.futures.ProcessPoolExecutor` would fail all that are left.
The processes have sessions of their own: Ctrl-C reaches only the race, which then stops them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, Any, Protocol

from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.errors import BadInput, one_line

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Listener(Protocol):
    """What is told how the trials of a race go. `started` and `progress` are called from threads."""

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
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, trials: Iterable[Trial], done: Callable[[Run], None], failed: Callable[[Trial, str], None]) -> None:
        """Run the trials in order, and call back in this thread as each ends. An exception, Ctrl-C too, stops all."""
        with ThreadPoolExecutor(self.workers) as threads:
            futures = {threads.submit(self._run, trial): trial for trial in trials}
            try:
                for future in as_completed(futures):
                    try:
                        record = future.result()
                    except TrialFailed as error:
                        failed(futures[future], str(error))
                    except OSError as error:  # no room for a temporary file, no memory for a process
                        raise BadInput(f"can't start a run: {one_line(error)}; finished runs are kept") from error
                    else:
                        done(Run(futures[future], record))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def _run(self, trial: Trial) -> Record:
        """Return the record of a trial that runs in a process of its own."""
        with tempfile.TemporaryFile("w+") as stderr:
            process = self._start(trial, stderr)
            self.listener.started(trial)
            try:
                return self._listen(process, trial, stderr)
            finally:
                process.terminate()  # its record is here, or nobody needs it: there is no need for a tidy end
                process.wait()
                with self._lock:
                    self._processes.discard(process)

    def _start(self, trial: Trial, stderr: IO[str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise TrialFailed("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "steepest.lab.race.worker", trial.literal()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
            )
            self._processes.add(process)
            return process

    def _listen(self, process: subprocess.Popen[str], trial: Trial, stderr: IO[str]) -> Record:
        """Pass the trial's progress on until its record comes."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                message: dict[str, Any] = json.loads(line)
                if "record" in message:
                    return Record(**message["record"])
                if "error" in message:
                    raise TrialFailed(message["error"])
                self.listener.progress(trial, **message)
        stderr.seek(0)
        complaints = stderr.read().strip().splitlines()
        raise TrialFailed(complaints[-1] if complaints else f"its process ended with status {process.wait()}")

    def _stop(self) -> None:
        """Terminate the processes, and let no further one start."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()
