"""Checkpoints that some ranks write and others read in another layout resume bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import saving
import torch
from ranks import Ranks

MATRIX = {  # written by: read by (ranks, layout)
    "fsdp": [(4, "hsdp"), (2, "ddp"), (1, "one")],
    "hsdp": [(2, "fsdp")],
    "ddp": [(4, "fsdp+tp")],
    "fsdp+tp": [(2, "tp"), (4, "fsdp")],
}
WHOLE = [(ranks, layout) for ranks in (2, 3, 4) for layout in ("ddp", "fsdp")]
WHOLE += [(4, "hsdp"), (4, "tp"), (4, "fsdp+tp"), (2, "tp"), (1, "one")]


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks, because the last bits of a product depend on it
    yield
    torch.set_num_threads(threads)


def resumed(by_number: dict[int, Ranks], ranks: int, layout: str, *args: Any) -> list[str]:
    """Return the parameters of a resumed run that differ from those of an unbroken run."""
    if ranks == 1:
        return saving.resume("one", *args)
    return sorted({name for names in by_number[ranks].run(saving.resume, layout, *args) for name in names})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads what several wrote
@pytest.mark.parametrize(
    "written", ["fsdp", *(pytest.param(w, marks=pytest.mark.slow) for w in ("hsdp", "ddp", "fsdp+tp"))]
)
def test_other_ranks_resume(four: Ranks, two: Ranks, one_thread: None, tmp_path: Path, written: str) -> None:
    flat = written in ("fsdp", "ddp")
    four.run(saving.save, written, "soap", {}, str(tmp_path), flat)
    for ranks, layout in MATRIX[written]:
        assert resumed({4: four, 2: two}, ranks, layout, "soap", {}, str(tmp_path), flat) == [], (ranks, layout)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rule", ["soap", "muon", "dion", "shampoo"])
@pytest.mark.parametrize("written", ["fsdp", "hsdp", "tp", "fsdp+tp", "ddp"])
def test_all_others_resume(
    four: Ranks, three: Ranks, two: Ranks, one_thread: None, tmp_path: Path, written: str, rule: str
) -> None:
    for flat in (False, True):
        path = str(tmp_path / str(flat))
        four.run(saving.save, written, rule, {}, path, flat)
        for ranks, layout in WHOLE:
            by_number = {4: four, 3: three, 2: two}
            assert resumed(by_number, ranks, layout, rule, {}, path, flat) == [], (ranks, layout, flat)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_moments_in_8_bits_resume_elsewhere(four: Ranks, two: Ranks, one_thread: None, tmp_path: Path) -> None:
    args = "lion", {"moment_dtype": "int8"}, str(tmp_path), True
    four.run(saving.save, "fsdp", *args)
    for ranks, layout in [(4, "hsdp"), (2, "ddp"), (1, "one")]:
        assert resumed({4: four, 2: two}, ranks, layout, *args) == [], (ranks, layout)


@pytest.mark.slow
def test_saved_in_the_background(four: Ranks, two: Ranks, tmp_path: Path) -> None:
    four.run(saving.save, "fsdp", "soap", {}, str(tmp_path), False, True)
    assert resumed({2: two}, 2, "fsdp", "soap", {}, str(tmp_path), False) == []


@pytest.mark.slow
def test_another_assignment_of_owners(four: Ranks, tmp_path: Path) -> None:
    four.run(saving.save, "fsdp", "soap", {}, str(tmp_path), False)
    assert resumed({4: four}, 4, "fsdp", "soap", {"precondition_frequency": 1}, str(tmp_path), False) == []


def test_consolidated_state_round_trips(two: Ranks) -> None:
    assert two.run(saving.consolidated, "fsdp", "soap") == [([], []), ([], [])]


def test_consolidated_state_round_trips_on_a_mesh_with_replicas_that_it_does_not_show(four: Ranks) -> None:
    """Under FSDP and tensor parallelism each column of the mesh has owners of its own for what is not split there."""
    assert four.run(saving.consolidated, "fsdp+tp", "soap", timeout=60) == [([], [])] * 4


def test_a_part_is_not_saved_for_the_whole(two: Ranks) -> None:
    for said in two.run(saving.refused):
        assert all("consolidate()" in words and "torch.distributed.checkpoint" in words for words in said)


@pytest.mark.slow
def test_a_rank_killed_in_mid_step(tmp_path: Path) -> None:
    """A killed rank ends the job, and a restart from the last complete checkpoint ends as an undisturbed run does."""
    script = Path(__file__).with_name("crash.py")
    ends = {}
    for how in ("undisturbed", "killed in a step", "killed in a save"):
        folder = tmp_path / how.replace(" ", "-")
        for _ in range(2 if how != "undisturbed" else 1):
            subprocess.run([sys.executable, str(script), str(folder), how], timeout=240, check=False)
        ends[how] = torch.load(folder / "end.pt", weights_only=True)
    for how in ("killed in a step", "killed in a save"):
        for name, x in ends["undisturbed"].items():
            assert torch.equal(x, ends[how][name]), (how, name)
