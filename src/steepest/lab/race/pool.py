"""The crew: runs trials side by side, each in a fresh process with one thread.

A process per trial, rather than a pool that is kept, so that peak memory is the trial's own and nothing that one trial
does can reach the next. The processes have sessions of their own: Ctrl-C reaches the race, which then stops them.
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


class Audience(Protocol):
    """Who is told what the crew does. `started`, `news` and `ended` are called from threads."""

    def skipped(self, trial: Trial) -> None:
        """The trial was run before."""

    def started(self, trial: Trial) -> None:
        """A process runs the trial now."""

    def news(self, trial: Trial, step: int, train: float, validation: float | None) -> None:
        """The trial has got this far."""

    def ended(self, trial: Trial) -> None:
        """The trial's process is gone."""

    def finished(self, run: Run) -> None:
        """The trial has left its record."""

    def failed(self, trial: Trial, reason: str) -> None:
        """The trial has left none."""


class TrialFailed(Exception):
    """A trial's process ended with an error instead of a record."""


class Crew:
    """Up to ``workers`` processes."""

    def __init__(self, workers: int, audience: Audience) -> None:
        self.workers = workers
        self.audience = audience
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, trials: Iterable[Trial], done: Callable[[Run], None], failed: Callable[[Trial, str], None]) -> None:
        """Run the trials, the first ones first, and tell of each as it ends. An exception, Ctrl-C too, stops all."""
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
        """The trial's record, from a process of its own."""
        with tempfile.TemporaryFile("w+") as complaints:
            process = self._start(trial, complaints)
            self.audience.started(trial)
            try:
                return self._listen(process, trial, complaints)
            finally:
                process.terminate()  # its record is here, or nobody wants it: no need to wait for a tidy end
                process.wait()
                with self._lock:
                    self._processes.discard(process)
                self.audience.ended(trial)

    def _start(self, trial: Trial, complaints: IO[str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "steepest.lab.race.worker", trial.literal()]
        with self._lock:
            if self._stopped:
                raise TrialFailed("stopped")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
            )
            self._processes.add(process)
            return process

    def _listen(self, process: subprocess.Popen[str], trial: Trial, complaints: IO[str]) -> Record:
        """Pass the news on until the record comes."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                message: dict[str, Any] = json.loads(line)
                if "record" in message:
                    return Record(**message["record"])
                if "error" in message:
                    raise TrialFailed(message["error"])
                self.audience.news(trial, **message)
        complaints.seek(0)
        said = complaints.read().strip().splitlines()
        raise TrialFailed(said[-1] if said else f"its process ended with status {process.wait()}")

    def _stop(self) -> None:
        """End what runs, and let nothing start any more."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()
