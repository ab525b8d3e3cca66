"""The pool of worker processes: trials run side by side, each in a fresh process with one thread.

Each trial has a process of its own, so nothing that it does reaches the next trial, and a process that is killed fails
one trial only; a `concurrent.futures.ProcessPoolExecutor` would fail all that are left.
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
from typing import Any

from steepest.lab.race.console import ProgressBars
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.errors import BadInput, one_line

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Pool:
    """Up to ``workers`` processes, each with one trial, whose progress ``bars`` show."""

    def __init__(self, workers: int, bars: ProgressBars) -> None:
        self.workers, self.bars = workers, bars
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, trials: Iterable[Trial], ended: Callable[[Trial, Record | str], None]) -> None:
        """Run the trials in order, and call ``ended`` in this thread with each one's record or reason for failure.

        An exception, Ctrl-C too, stops all.
        """
        with ThreadPoolExecutor(self.workers) as threads:
            futures = {threads.submit(self._run, trial): trial for trial in trials}
            try:
                for future in as_completed(futures):
                    try:
                        outcome = future.result()
                    except OSError as error:  # no room for a temporary file, no memory for a process
                        raise BadInput(f"can't start a run: {one_line(error)}; finished runs are kept") from error
                    ended(futures[future], outcome)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                with self._lock:
                    self._stopped = True
                    for process in self._processes:
                        process.terminate()
                raise

    def _run(self, trial: Trial) -> Record | str:
        """Run a trial in a process of its own, and return its record or why it has none."""
        with tempfile.TemporaryFile("w+") as stderr:
            with self._lock:
                if self._stopped:
                    return "stopped"
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
            self.bars.started(trial)
            try:
                if (outcome := self._listen(process, trial)) is not None:
                    return outcome
                stderr.seek(0)
                complaints = stderr.read().strip().splitlines()
                return complaints[-1] if complaints else f"its process ended with status {process.wait()}"
            finally:
                process.terminate()  # its record is here, or nobody needs it: there is no need for a tidy end
                process.wait()
                with self._lock:
                    self._processes.discard(process)

    def _listen(self, process: subprocess.Popen[str], trial: Trial) -> Record | str | None:
        """Show the trial's progress until its record or an error comes; None if the process ends with neither."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                message: dict[str, Any] = json.loads(line)
                if "record" in message:
                    return Record(**message["record"])
                if "error" in message:
                    return str(message["error"])
                self.bars.progress(trial, **message)
        return None
