from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steepest.lab.plan import here as plan_here
from steepest.lab.race.race import Entry, Plan, Runs
from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.contenders import preset
from steepest.lab.workloads import cache, lora
from steepest.lab.workloads.workload import Workload, load_workload

# Files that tests share and those in benchmarks/ are imported by name.
sys.path.insert(0, str(Path(__file__).parent))
sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("benchmarks", "benchmarks/experiments")]

QUICK_TASK = """
import os, pathlib, time
import torch
from torch import nn
from steepest.lab import Workload

class Quick(Workload):
    steps = 4

    def model(self):
        pathlib.Path(__file__).with_suffix("." + str(os.getpid())).touch()
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def batch(self, generator):
        return torch.randn(8, 4, generator=generator)

    def loss(self, model, batch):
        time.sleep({pause})
        return (model(batch) - batch[:, :2]).square().mean()

    def validation(self, model):
        return self.loss(model, torch.ones(1, 4)).item()
"""


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Workload]]:
    """Loads a workload once for all tests, which must not change it; the base of lora is hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "BASE_STEPS", 1)
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(cache, "folder", lambda: folder)
        yield functools.cache(load_workload)


@pytest.fixture
def quick_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes a workload file; its steps take ``pause`` seconds, and its models leave the numbers of their processes."""

    def write(pause: float = 0.0) -> Path:
        path = tmp_path / "quick_task.py"
        path.write_text(QUICK_TASK.format(pause=pause))
        return path

    return write


def _record(final: float, steps: int = 10, status: str = "finished", optimizer_ms: float = 1.0) -> Record:
    """A run that comes down to ``final`` in a straight line from 3 above it."""
    losses = [final + 3 * (1 - i / steps) for i in range(1, steps + 1)]
    return Record(
        status=status,
        train_loss=losses,
        model_seconds=[0.01] * steps,
        optimizer_seconds=[optimizer_ms / 1e3] * steps,
        validation=[(i + 1, loss) for i, loss in enumerate(losses)],
        parameters=100,
        state_bytes=800,
        peak_memory=10**8,
        wall_seconds=1.0,
        clock="CPU time",
    )


def _runs(plan: Plan, final: Callable[[Trial], float], **fields: object) -> Runs:
    """A race in which every trial of the plan was run, with these final losses; infinite ones diverged."""
    found = Runs(plan)

    def run(trials: list[Trial]) -> None:
        for trial in trials:
            loss = final(trial)
            status = "finished" if loss < float("inf") else "diverged"
            found.finished.append(Run(trial, _record(min(loss, 9.0), trial.steps, status, **fields)))

    run(plan.tuning())
    run(plan.finals([best for entry in plan.entries if (best := found.best(entry)) is not None]))
    return found


def _plan(*names: str, steps: int = 10, seeds: int = 2, shorter: tuple[int, ...] = (), swept: bool = False) -> Plan:
    contenders = [preset(name) for name in names]
    entries = tuple(Entry.of(c, {"lr": c.rates} if swept else {}) for c in contenders)
    return Plan("digits", entries, steps, seeds, shorter)


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return _record


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., Plan]:
    return _plan


@pytest.fixture(scope="session")
def make_runs() -> Callable[..., Runs]:
    return _runs


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured in a millisecond each: they are figures all the same, if rough ones."""
    monkeypatch.setattr(plan_here, "ENOUGH", 1e-3)


FORK_SERVER = """
import os, sys
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"))
while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        log = os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        status = main(line)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(child, flush=True)
    sys.stdin.readline()  # until its end is asked for, its process id stays its own, even when it has ended
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkServer:
    """A process that has imported everything; its copies run ``main(line)`` of a script, and may be killed."""

    def __init__(self, script: str, folder: Path) -> None:
        (folder / "script.py").write_text(script)
        self.log = folder / "log.txt"
        command = [sys.executable, "-c", FORK_SERVER, str(folder / "script.py"), str(self.log)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.child = 0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, line: str) -> None:
        """A copy with its line; one that a failed test has left is ended first."""
        if self.child:
            self.kill()
            self.end()
        self._write(line)
        self.child = int(self._read())

    def kill(self) -> None:
        """Kill the copy, wherever it is; it may have ended."""
        assert self.child > 1, "0 would be this very process group"
        os.kill(self.child, signal.SIGKILL)

    def end(self) -> int:
        """Wait for the end of the copy; its exit status, negative if it was killed."""
        self._write("")
        self.child = 0
        return int(self._read())

    def run(self, line: str) -> tuple[int, str]:
        """A copy from its start to its end: exit status, and what it printed."""
        self.start(line)
        return self.end(), self.log.read_text()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        """End the server; the copies have ended."""
        with self.process:  # closes its pipes, and waits
            assert self.process.stdin is not None
            self.process.stdin.close()


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ForkServer]]:
    """Starts a server that runs a script."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    servers: list[ForkServer] = []

    def start(script: str) -> ForkServer:
        servers.append(ForkServer(script, tmp_path_factory.mktemp("server")))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
