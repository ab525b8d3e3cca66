"""`import steepest` offers all public names, and imports them, and torch, when one is used."""

from __future__ import annotations

import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steepest
from steepest.optimizers import public

LAZY = """
import sys
import steepest
assert steepest.__version__
assert "torch" not in sys.modules
assert {"SOAP", "for_model", "__version__"} <= set(dir(steepest))
assert steepest.lab.Workload.__name__ == "Workload"
from steepest import *
assert SOAP is steepest.SOAP
assert "SOAP" in vars(steepest)
"""


def test_names_are_imported_when_they_are_used() -> None:
    subprocess.run([sys.executable, "-c", LAZY], check=True)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'steepest' has no attribute 'SAOP'"):
        _ = steepest.SAOP
    with pytest.raises(ImportError, match="cannot import name 'SAOP' from 'steepest'"):
        from steepest import SAOP  # noqa: F401
    assert not hasattr(steepest, "_private")


def test_all_names_are_there() -> None:
    assert steepest.__all__ == public.__all__ == sorted(public.__all__, key=lambda name: (not name.isupper(), name))
    assert all(getattr(steepest, name) is getattr(public, name) for name in steepest.__all__)


def test_help_and_pickles_find_them() -> None:
    shown = pydoc.plain(pydoc.render_doc(steepest))
    assert "class SOAP" in shown
    assert "for_model(" in shown
    optimizer = steepest.SOAP([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
    assert type(pickle.loads(pickle.dumps(optimizer))) is steepest.SOAP


USER = """
import torch
import steepest
from steepest import *

W = torch.nn.Parameter(torch.zeros(2, 3))
reveal_type(steepest.SOAP([W], lr=0.1))
reveal_type(Lion([W]))
steepest.SOAP([W], lr=0.1, nonsense=1)
steepest.SAOP
"""


@pytest.mark.slow
def test_type_checkers_see_real_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "user.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert '7: note: Revealed type is "steepest.optimizers.soap.SOAP"' in said
    assert '8: note: Revealed type is "steepest.optimizers.lion.Lion"' in said
    assert '9: error: Unexpected keyword argument "nonsense" for "SOAP"' in said
    assert '10: error: Module has no attribute "SAOP"' in said
    assert "Found 2 errors" in said
