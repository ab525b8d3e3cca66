"""A race that is killed at any moment, or finds no room for its records, loses only the runs in progress."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import alive, processes
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.race import pool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")

RACE = """
import json, os, resource, signal
import torch
import steepest
from steepest import cli
from steepest.lab.race import pool
from steepest.lab.shared import fingerprints
from steepest.lab.race import training
from steepest.lab.workloads import workload
from steepest.lab.race.trial import Record

torch.set_num_threads(1)
DIGITS = workload.load_workload("digits")
fingerprints.library_hash()
steepest.for_model(DIGITS.model(), "soap", lr=0.1)  # torch imports more for its first optimizer

def run(self, trial):  # in this process, which has everything imported
    return Record(**training.train(trial, DIGITS, lambda progress: None).as_json())

pool.Pool._run = run
fsync, replace = os.fsync, os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(moment, left):
    def hooked_fsync(file):
        nonlocal left
        left -= 1
        if left == 0 and moment == "half written":
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()
        fsync(file)

    def hooked_replace(source, target):
        if left == 0 and moment == "written":
            die()
        replace(source, target)
        if left == 0 and moment == "in place":
            die()

    os.fsync, os.replace = hooked_fsync, hooked_replace

def main(line):
    task = json.loads(line)
    if "moment" in task:
        die_at(task["moment"], task["write"])
    if "largest" in task:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest"], task["largest"]))
    try:
        cli.app(["race", *task["arguments"]])
    except SystemExit as end:
        return end.code
"""

OPTIONS = ["--workload", "digits", "--steps", "6", "--optimizers", "adamw, soap, muon", "--workers", "1"]
RUNS = 6
TIMES = {"model_seconds", "optimizer_seconds", "wall_seconds", "cpu_seconds"}
Files = dict[str, str]


@pytest.fixture(scope="module")
def server(fork_server: Callable[[str], Any]) -> Any:
    """Return a server that runs races, with trials in its own process."""
    return fork_server(RACE)


def line(out: Path, seeds: int = 2, **fault: Any) -> str:
    return json.dumps({"arguments": [*OPTIONS, "--seeds", str(seeds), "--out", str(out)], **fault})


@pytest.fixture(scope="module")
def straight(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a race without faults."""
    out = tmp_path_factory.mktemp("straight")
    status, said = server.run(line(out))
    assert status == 0, said
    assert len(records(out)) == RUNS
    return out


def records(out: Path) -> Files:
    """Return the texts of the records, by file name."""
    return {path.name: path.read_text() for path in out.glob("runs/*.json")}


def learnt(out: Path) -> dict[str, Any]:
    """Return the values of each record that do not depend on time and memory."""
    found = {name: json.loads(text)["record"] for name, text in records(out).items()}
    return {name: {k: v for k, v in record.items() if k not in TIMES} for name, record in found.items()}


def finals(out: Path) -> dict[str, Any]:
    """Return the losses in the results."""
    found = json.loads((out / "results.json").read_text())
    return {"target": found["target"]} | {line["contender"]: line["finals"] for line in found["contenders"]}


def expect_as_undisturbed(server: Any, out: Path, straight: Path) -> None:
    """Continue the race: it must end as one without faults, and leave earlier records as they were."""
    kept = records(out)
    status, said = server.run(line(out))
    assert status == 0, said
    assert kept.items() <= records(out).items()
    assert learnt(out) == learnt(straight)
    assert finals(out) == finals(straight)
    assert (out / "report.html").read_text().rstrip().endswith("</html>")


# Killed.


def expect_killed(status: int, out: Path, before: Files) -> Files:
    """Check that earlier records are as they were and that all records are complete, and return them."""
    assert status == -signal.SIGKILL
    after = records(out)
    assert before.items() <= after.items()
    assert all(json.loads(text)["record"]["status"] == "finished" for text in after.values())
    return after


@pytest.mark.parametrize("moment", ["half written", "written", "in place"])
def test_killed_while_a_file_is_written(server: Any, straight: Path, tmp_path: Path, moment: str) -> None:
    """Of the files that are left to write (six records, results and a report), the second is hit each time."""
    out = tmp_path / "out"
    kept: Files = {}
    for _ in range(2):
        known = len(kept)
        kept = expect_killed(server.run(line(out, moment=moment, write=2))[0], out, kept)
        assert len(kept) == min(known + (2 if moment == "in place" else 1), RUNS)
    expect_as_undisturbed(server, out, straight)


def test_killed_at_random(server: Any, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept: Files = {}
    chance = random.Random(0)
    for further in (0, 1, 0, 1, 0, 1, 1):  # records that it may add before its time begins to run out
        server.start(line(out))
        while len(records(out)) < min(len(kept) + further, RUNS):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.1))
        server.kill()
        kept = expect_killed(server.end(), out, kept)
    assert len(kept) >= 4
    expect_as_undisturbed(server, out, straight)


def real_race(task: Path, out: Path, *options: str) -> list[str]:
    race = [sys.executable, "-m", "steepest.cli", "race", "--optimizers", "soap", "--workload", str(task)]
    return [*race, "--out", str(out), *options]


def run_and_kill(command: list[str], until: Callable[[], bool], seconds: float = 0.0) -> int:
    """Start a race, and kill its process only, some seconds after ``until`` holds; return its status."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not until() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(seconds)
    finally:
        process.kill()
        status = process.wait()
    return status


MARKS_ITS_START = """
    def batch(self, generator):
        import pathlib, sys
        if "steepest.lab.race.worker" in sys.orig_argv:
            pathlib.Path({mark!r}).touch()
        return torch.randn(8, 4, generator=generator)
"""


def test_the_trial_of_a_killed_race_ends_by_itself(quick_task: Callable[..., Path], tmp_path: Path) -> None:
    """It would train for many minutes."""
    out, task, mark = tmp_path / "out", quick_task(pause=0.1), tmp_path / "started"
    task.write_text(task.read_text() + MARKS_ITS_START.format(mark=str(mark)))
    race = real_race(task, out, "--seeds", "1", "--workers", "1", "--steps", "10000")
    assert run_and_kill(race, mark.exists) == -signal.SIGKILL
    assert mark.exists()
    assert processes(task)
    deadline = time.monotonic() + 60
    while alive(task) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(task)
    assert records(out) == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_with_its_trials_in_processes(quick_task: Callable[..., Path], tmp_path: Path) -> None:
    out, task, kills = tmp_path / "out", quick_task(pause=0.1), 8
    options = ("--seeds", str(2 * kills + 1), "--workers", "2")
    chance = random.Random(0)
    kept: Files = {}
    for _ in range(kills):
        further = partial(lambda known: len(records(out)) > known, len(kept))
        kept = expect_killed(run_and_kill(real_race(task, out, *options), further, chance.uniform(0, 0.2)), out, kept)
    for folder in (out, tmp_path / "straight"):
        done = subprocess.run(real_race(task, folder, *options), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert kept.items() <= records(out).items()
    assert len(records(out)) == 2 * kills + 1
    assert learnt(out) == learnt(tmp_path / "straight")
    assert not alive(task)


# No room.


def expect_one_line(status: int, said: str, *parts: str) -> None:
    """Check that the last line is the only complaint and contains these parts, and that the status is 2."""
    assert status == 2, said
    assert "Traceback" not in said
    (complaint,) = (text for text in said.splitlines() if text.startswith("steepest: "))
    assert said.rstrip().endswith(complaint)
    for part in parts:
        assert part in complaint


def test_no_room_for_a_record(server: Any, straight: Path, tmp_path: Path) -> None:
    """The first write that fails ends the race: its file does not exist, and earlier files do."""
    out = tmp_path / "out"
    assert server.run(line(out, seeds=1))[0] == 0
    kept = records(out)
    status, said = server.run(line(out, largest=1000))
    remedy = "make room there, and the same command continues: runs are kept"
    expect_one_line(status, said, f"can't write to {out / 'runs'}: File too large; {remedy}")
    assert {path.name: path.read_text() for path in (out / "runs").iterdir()} == kept
    expect_as_undisturbed(server, out, straight)


def test_no_room_for_the_report(server: Any, straight: Path, tmp_path: Path) -> None:
    """All runs are kept by then, and the table was printed."""
    out = tmp_path / "out"
    status, said = server.run(line(out, largest=10**6))
    expect_one_line(status, said, f"can't write to {out}: File too large; make room there")
    assert "No contender is ahead" in said or "reaches" in said
    assert learnt(out) == learnt(straight)
    assert not (out / "report.html").exists()
    expect_as_undisturbed(server, out, straight)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a disk of its own")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    """Fill the disk."""
    page = bytes(4096)
    with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(page)


def test_a_disk_that_is_full(server: Any, straight: Path, disk: Path) -> None:
    assert server.run(line(disk, seeds=1))[0] == 0
    kept = records(disk)
    fill(disk)
    status, said = server.run(line(disk))
    expect_one_line(status, said, f"can't write to {disk / 'runs'}: No space left on device; make room there")
    assert records(disk) == kept
    (disk / "filler").unlink()
    expect_as_undisturbed(server, disk, straight)


def test_a_disk_that_is_full_from_the_start(server: Any, disk: Path) -> None:
    fill(disk)
    status, said = server.run(line(disk))
    expect_one_line(status, said, f"can't write to {disk / 'runs'}: No space left on device; make room there")


def test_a_disk_that_is_read_only(server: Any, straight: Path, disk: Path) -> None:
    assert server.run(line(disk, seeds=1))[0] == 0
    kept = records(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, said = server.run(line(disk))
    remedy = "make it writable, or give another folder by --out"
    expect_one_line(status, said, f"can't write to {disk / 'runs'}: Read-only file system; {remedy}")
    assert records(disk) == kept
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    expect_as_undisturbed(server, disk, straight)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(server: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    status, said = server.run(line(tmp_path))
    tmp_path.chmod(0o700)
    expect_one_line(status, said, f"can't write to {tmp_path / 'runs'}: Permission denied; make it writable")


def test_no_room_for_a_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a temporary file for a trial's process, no other trial could run either, so the race ends."""

    def full(*args: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(pool.tempfile, "TemporaryFile", full)
    done = CliRunner().invoke(app, ["race", *OPTIONS, "--out", str(tmp_path)])
    expect_one_line(done.exit_code, done.output, "can't start a run: FileNotFoundError: [Errno 2] No usable temporary")
