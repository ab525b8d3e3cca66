from __future__ import annotations

import hashlib

import torch

from steepest.lab.workloads import stdlib, text


def test_the_text_is_the_same_each_time_it_is_read() -> None:
    first = stdlib.load_text()
    stdlib.load_text.cache_clear()
    second = stdlib.load_text()
    assert first.sha256 == second.sha256
    assert torch.equal(first.train, second.train)
    assert len(first.train) > 4_000_000
    assert len(first.validation) > 100_000


def test_the_alphabet_is_newline_and_printable_ascii() -> None:
    assert len(stdlib.ALPHABET) == 96
    assert stdlib.load_text().train.amin() == 0
    assert stdlib.load_text().train.amax() == 95


def test_no_module_is_both_trained_on_and_held_out() -> None:
    assert not set(text.TRAINING_MODULES.split()) & set(text.VALIDATION_MODULES.split())


def test_a_missing_module_is_skipped_and_named(tmp_path) -> None:
    (tmp_path / "ast.py").write_text("x\t= 'é'\n")
    (tmp_path / "bz2.py").write_text("y")
    found = stdlib.load_text(str(tmp_path))
    assert "".join(stdlib.ALPHABET[i] for i in found.train) == "x    = ''\n"
    assert "argparse" in found.missing
    assert "ast" not in found.missing
    assert found.sha256 == hashlib.sha256(b"x    = ''\n\0y").hexdigest()
