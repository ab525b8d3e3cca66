"""The processes of a pool: each trial has its own, whatever the last one did to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import alive, processes

from steepest.lab.race import worker
from steepest.lab.race.pool import Pool
from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.contenders import preset


class Bars:
    """Shows nothing."""

    def started(self, trial: Trial) -> None: ...
    def progress(self, trial: Trial, done: float, train: float, validation: float | None) -> None: ...


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(1, Bars()) as one:
        yield one


def outcomes(pool: Pool, task: Path, trials: int = 2) -> list[Record | str]:
    """Run trials of a task one after the other."""
    found: list[Record | str] = []
    pool.run([Trial(str(task), preset("soap"), 4, seed) for seed in range(trials)], lambda _, end: found.append(end))
    return found


def with_batch(task: Path, *lines: str) -> Path:
    """Replace what the task does for a batch by these lines and the batch."""
    body = "".join(f"        {line}\n" for line in (*lines, "return torch.randn(8, 4, generator=generator)"))
    task.write_text(task.read_text() + f"\n    def batch(self, generator):\n{body}")
    return task


def test_each_trial_has_a_process_of_its_own(pool: Pool, quick_task: Callable[..., Path]) -> None:
    task = quick_task()
    assert [type(end) for end in outcomes(pool, task, 3)] == [Record] * 3
    assert len(processes(task)) == 3
    assert [type(end) for end in outcomes(pool, task)] == [Record] * 2  # another round
    assert len(processes(task)) == 5
    assert alive(task) == []


@pytest.mark.skipif(not worker.can_fork(), reason="forks are not safe here")
def test_trials_are_forks_of_one_process_until_the_pool_ends(quick_task: Callable[..., Path], tmp_path: Path) -> None:
    parents = tmp_path / "parents"
    task = with_batch(quick_task(), f"print(os.getppid(), file=open({str(parents)!r}, 'a'))")
    with Pool(1, Bars()) as pool:
        outcomes(pool, task)
        outcomes(pool, task)
        (parent,) = set(parents.read_text().split())
        task.with_suffix(f".{parent}").touch()
        assert alive(task) == [parent]
    assert alive(task) == []


def test_nothing_that_a_trial_does_reaches_the_next(pool: Pool, quick_task: Callable[..., Path]) -> None:
    changes = ("assert not hasattr(torch, 'changed') or torch.changed == os.getpid()", "torch.changed = os.getpid()")
    task = with_batch(quick_task(), *changes)
    assert not any(isinstance(end, str) for end in outcomes(pool, task))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("os._exit(0)", "its process ended with status 0"),
        ("os._exit(3)", "its process ended with status 3"),
        ("import sys; print('no more room', file=sys.stderr); os._exit(1)", "no more room"),
        ("raise SystemExit('enough')", "SystemExit: enough"),
        ("raise ValueError('no batch')", "no batch"),
        ("print('chatter'); input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_trial_that_ends_early_says_why_and_the_next_one_runs(
    pool: Pool, quick_task: Callable[..., Path], line: str, reason: str
) -> None:
    task = with_batch(quick_task(), f"if torch.initial_seed() == 0: {line}")
    first, second = outcomes(pool, task)
    assert isinstance(first, str)
    assert first.endswith(reason)
    assert isinstance(second, Record)


def test_where_forks_are_not_safe_each_trial_starts_afresh(
    quick_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import torch; torch.cuda.device_count = lambda: 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    task = quick_task()
    with Pool(1, Bars()) as pool:
        assert [type(end) for end in outcomes(pool, task)] == [Record] * 2
    assert len(processes(task)) == 2


def test_a_worker_that_can_not_start_says_why(
    quick_task: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with Pool(1, Bars()) as pool:
        assert outcomes(pool, quick_task()) == ["ImportError: torch is broken"] * 2


def test_a_pool_can_run_nothing_after_its_end(quick_task: Callable[..., Path]) -> None:
    with Pool(1, Bars()) as pool:
        pass
    assert outcomes(pool, quick_task(), 1) == ["stopped"]
    assert sys.platform == "win32" or processes(quick_task()) == []
