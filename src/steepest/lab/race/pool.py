"""The pool of worker processes: trials run side by side, each in a process of its own with one thread.

So nothing that a trial does reaches the next one, and a process that is killed fails one trial only; a
`concurrent.futures.ProcessPoolExecutor` would fail all that are left.
The processes have sessions of their own: Ctrl-C reaches only the race, which then stops them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any, Self

from steepest.lab.race.console import ProgressBars
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.errors import BadInput, one_line

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Pool:
    """Up to ``workers`` processes, each with one trial, whose progress ``bars`` show; a context that ends with them."""

    def __init__(self, workers: int, bars: ProgressBars) -> None:
        self.workers, self.bars = workers, bars
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

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
                self._stop()
                raise

    def _stop(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._stopped = True
            for worker in self._busy:
                worker.kill()  # the thread that listens to it closes it
            while self._idle:
                self._idle.pop().close()

    def _run(self, trial: Trial) -> Record | str:
        """Run a trial in a process of its own, and return its record or why it has none."""
        with self._lock:
            if self._stopped:
                return "stopped"
            worker = self._idle.pop() if self._idle else Worker()
            self._busy.add(worker)
        self.bars.started(trial)
        try:
            return worker.run(trial, self.bars)
        finally:
            with self._lock:
                self._busy.discard(worker)
                if worker.ready and not self._stopped:
                    self._idle.append(worker)
                else:
                    worker.close()


class Worker:
    """A process of `steepest.lab.race.worker`, with one trial at a time."""

    def __init__(self) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115, it is closed by `close`
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "steepest.lab.race.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=os.environ | ONE_THREAD,
                start_new_session=True,
            )
        except OSError:
            self._stderr.close()
            raise
        self.ready = True
        """Whether it takes a trial."""

    def run(self, trial: Trial, bars: ProgressBars) -> Record | str:
        """Run a trial, show its progress, and return its record or why it has none."""
        trials, messages = self._process.stdin, self._process.stdout
        assert trials, "it is a pipe"
        assert messages, "it is a pipe"
        self.ready = False
        outcome: Record | str | None = None
        status: int | None = None
        self._stderr.seek(0)
        self._stderr.truncate()
        with suppress(BrokenPipeError):  # it has ended before its first trial, and stderr says why
            print(trial.literal(), file=trials, flush=True)
        for line in messages:
            message: dict[str, Any] = json.loads(line)
            if "status" in message:
                self.ready, status = True, message["status"]
                break
            if "record" in message:
                outcome = Record(**message["record"])
            elif "error" in message:
                outcome = str(message["error"])
            else:
                bars.progress(trial, **message)
        if outcome is not None:
            return outcome
        self._stderr.seek(0)
        if complaints := self._stderr.read().strip().splitlines():
            return complaints[-1]
        return f"its process ended with status {self._process.wait() if status is None else status}"

    def kill(self) -> None:
        """End it, and the trial that it runs."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
        else:
            self._process.terminate()

    def close(self) -> None:
        """End it and wait for that."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream, "it is a pipe"
            with suppress(OSError):
                stream.close()
        self._process.wait()
