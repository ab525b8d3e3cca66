from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import alive, processes
from short_training import Here
from typer.testing import CliRunner

import steepest
from steepest.cli import app
from steepest.lab.race import command

ROOT = Path(__file__).parents[2]


def steepest_race(*arguments: object):
    return CliRunner().invoke(app, ["race", *map(str, arguments)])


def test_a_tiny_race_end_to_end_and_again(quick_task, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "Pool", Here)  # with processes: test_a_trial_that_is_killed_...
    out = tmp_path / "out"
    options = ("--workload", quick_task(), "--optimizers", "adamw, soap(lr=1e-2)", "--seeds", 1, "--out", out)
    first = steepest_race(*options)
    assert first.exit_code == 0, first.output
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert len(kept) == 2
    found = json.loads((out / "results.json").read_text())
    assert {line["contender"] for line in found["contenders"]} == {"adamw", "soap(lr=0.01)"}
    assert found["headline"].split()[0] in (out / "report.html").read_text()
    assert "report.html" in first.output

    second = steepest_race(*options)
    assert second.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == kept


def test_the_example_of_an_own_task_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "Pool", Here)
    example = ROOT / "examples" / "race_my_task.py"
    done = steepest_race("--workload", example, "--optimizers", "adamw", "--steps", 15, "--seeds", 1, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "squared distance" in (tmp_path / "report.html").read_text()


def test_a_trial_that_fails_is_named(quick_task, tmp_path) -> None:
    task = quick_task()
    task.write_text(task.read_text() + FAILS_LATE)
    done = steepest_race("--workload", task, "--optimizers", "adamw", "--seeds", 1, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "failed: RuntimeError: no more" in done.output


FAILS_LATE = """
    drawn = 0

    def batch(self, generator):
        self.drawn += 1
        if self.drawn == 4:
            raise RuntimeError("no more")
        return torch.randn(8, 4, generator=generator)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_trial_that_is_killed_is_named_and_the_others_go_on(quick_task, tmp_path) -> None:
    task = quick_task()
    task.write_text(task.read_text() + KILLS_THE_FIRST.format(mark=str(tmp_path / "killed")))
    options = ("--optimizers", "adamw, muon", "--seeds", 1, "--workers", 1, "--out", tmp_path / "out")
    done = steepest_race("--workload", task, *options)
    assert done.exit_code == 1
    assert done.output.count("failed: its process ended with status -9") == 1
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 1
    again = steepest_race("--workload", task, *options)
    assert again.exit_code == 0
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2


KILLS_THE_FIRST = """
    def batch(self, generator):
        import os, pathlib, signal, sys
        mark = pathlib.Path({mark!r})
        if "steepest.lab.race.worker" in sys.orig_argv and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.randn(8, 4, generator=generator)
"""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--optimizers", "sopa"], "unknown optimizer 'sopa'; did you mean 'soap'?"),
        (["--optimizers", "soap(nonsense=1)"], "nonsense=1"),
        (["--optimizers", "soap(lr"], "options are names and plain values"),
        (["--sweep", "lr"], 'sweep "lr"'),
        (["--workload", "nowhere"], "unknown workload 'nowhere'"),
        (["--workload", "nowhere.py"], "no such file"),
        (["--out", __file__], "can't write to"),
        (["--out", "/proc/nowhere"], "can't write to"),
    ],
)
def test_bad_input_gets_one_clear_line_and_status_2(tmp_path, monkeypatch, options, complaint) -> None:
    monkeypatch.chdir(tmp_path)
    done = steepest_race("--workload", "digits", *options)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line
    assert done.stdout == ""


def test_a_workload_that_fails_in_its_first_step_gets_one_clear_line(quick_task, tmp_path) -> None:
    task = quick_task()
    task.write_text(task.read_text().replace("batch[:, :2]", "batch"))
    done = steepest_race("--workload", task, "--out", tmp_path)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "workload quick_task.py: RuntimeError: The size of tensor" in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_leaves_a_report_and_no_processes(quick_task, tmp_path) -> None:
    out = tmp_path / "out"
    task = quick_task(pause=0.2)
    arguments = ["--workload", task, "--optimizers", "adamw", "--seeds", "4", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "steepest", "race", *map(str, arguments), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stdout + stderr
    assert "Traceback" not in stderr
    assert "Interrupted" in stdout
    assert "Interrupted" in (out / "report.html").read_text()
    assert len(processes(task)) > 1  # the race's, and its trials
    assert alive(task) == []


def test_help_and_the_version() -> None:
    """Each command has an example, and the page of all commands names each."""
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    for name in commands:
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert f"Example: steepest {name}" in shown.output
    for arguments in (["--help"], []):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0
        assert all(name in shown.output for name in commands)
    assert CliRunner().invoke(app, ["--version"]).output == f"steepest {steepest.__version__}\n"


ANSWERED_AT_ONCE = {
    "": (0, None),
    "race --help": (0, None),
    "rcae": (2, "steepest: No such command 'rcae'. Did you mean 'race'? (see python -m steepest --help)"),
    "race --steps 0": (2, "Invalid value for '--steps'"),
    "routes": (2, "(see python -m steepest routes --help)"),
}


@pytest.mark.parametrize("typed", ANSWERED_AT_ONCE)
def test_help_and_usage_errors_do_not_wait_for_torch(typed: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "steepest", *typed.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported, said = [], []
    for line in done.stderr.splitlines():
        (imported if line.startswith("import time:") else said).append(line)
    status, complaint = ANSWERED_AT_ONCE[typed]
    assert done.returncode == status
    assert not [line for line in imported if line.split("|")[-1].strip().partition(".")[0] == "torch"]
    if complaint is None:
        assert said == []
        assert "steepest" in done.stdout
    else:
        assert len(said) == 1
        assert complaint in said[0]


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.argv = ["steepest", "spike"]
from steepest.cli import main
main()
"""


def test_a_missing_package_gets_one_line_with_the_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == 'steepest: this needs torch; install it with: pip install "steepest[lab]"\n'
