from __future__ import annotations

import errno
import json
import os
from dataclasses import replace

import pytest

from steepest.lab.race.store import Store
from steepest.lab.race.trial import Run, Trial
from steepest.lab.shared.contenders import parse_contenders, preset
from steepest.lab.shared.errors import BadInput


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path, "fingerprint")


TRIAL = Trial("digits", preset("soap"), 10, 0)


def test_what_was_saved_is_found_again(store, make_record) -> None:
    assert store.find(TRIAL) is None
    store.save(Run(TRIAL, make_record(1.5)))
    assert store.find(TRIAL).record.final == 1.5
    assert not list(store.folder.glob("*.partial"))


def test_whatever_decides_a_result_is_part_of_its_identity(store, tmp_path, make_record) -> None:
    store.save(Run(TRIAL, make_record(1.5)))
    others = [
        replace(TRIAL, seed=1),
        replace(TRIAL, steps=11),
        replace(TRIAL, poison=0.01),
        replace(TRIAL, workload="stdlib"),
        replace(TRIAL, contender=TRIAL.contender.varied(lr=0.1)),
        replace(TRIAL, contender=TRIAL.contender.varied(warmup=0.0)),
        replace(TRIAL, contender=TRIAL.contender.varied(elementwise={"lr": 0.1})),
    ]
    assert [store.find(other) for other in others] == [None] * len(others)
    assert Store(tmp_path, "another text").find(TRIAL) is None


def test_a_label_decides_nothing(store, make_record) -> None:
    store.save(Run(replace(TRIAL, contender=preset("soap-f5")), make_record(1.5)))
    (same,) = parse_contenders("soap(precondition_frequency=5)")
    assert store.find(replace(TRIAL, contender=same)).record.final == 1.5


@pytest.mark.parametrize(("number", "remedy"), [(errno.EROFS, "make it writable"), (errno.EDQUOT, "make room there")])
def test_what_cannot_be_written_is_said_with_its_remedy(store, make_record, monkeypatch, number, remedy) -> None:
    def refuse(file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(BadInput) as caught:
        store.save(Run(TRIAL, make_record(1.5)))
    assert str(caught.value).startswith(f"can't write to {store.folder}: {os.strerror(number)}; {remedy}, and the same")
    assert not list(store.folder.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"record": {"nonsense": 1}}'])
def test_a_broken_file_counts_as_none(store, content) -> None:
    store.path(TRIAL).write_text(content)
    assert store.find(TRIAL) is None


def test_files_say_what_they_are(store, make_record) -> None:
    store.save(Run(TRIAL, make_record(1.5)))
    (path,) = store.folder.iterdir()
    assert path.name.startswith("soap-lr0.02-10-seed0-")
    identity = json.loads(path.read_text())["identity"]
    assert identity["versions"].keys() == {"steepest", "torch", "Python"}


def test_a_folder_that_cannot_be_written_to(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="can't write to"):
        Store(tmp_path / "file" / "runs", "")
