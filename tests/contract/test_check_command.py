"""``steepest check`` prints a table and returns an exit status for pipelines."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.listing import check as command
from steepest.testing import check_optimizer


def check(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "100"})


def test_ours_pass() -> None:
    done = check("soap", "--lr", "1e-2", "--option", "precondition_frequency=2")
    assert done.exit_code == 0, done.output
    assert "soap: 68 clauses kept, 0 broken, 7 not applicable" in done.output


@pytest.mark.parametrize("name", ["SOAP", "Muon", "Lion"])
def test_a_class_goes_by_its_path_which_is_no_emoji(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "check_optimizer", partial(check_optimizer, only=["closure"]))
    done = check(f"steepest:{name}")
    assert done.exit_code == 0, done.output
    first, *_, last = done.output.splitlines()
    assert first.startswith(f"steepest:{name}  steepest ")
    assert last == f"steepest:{name}: 1 clauses kept, 0 broken, 0 not applicable"


@pytest.mark.parametrize(
    "spec", ["kfac", "steepest:KFAC", "steepest:EKFAC", "gauss-newton", "lbfgs", "newton-cg", "steepest:LBFGS"]
)
def test_what_takes_a_model_or_a_closure_gets_it(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clauses = ["closure", "random_state", "nan_gradient", "closure_error"]
    monkeypatch.setattr(command, "check_optimizer", partial(check_optimizer, only=clauses))
    done = check(spec)
    assert done.exit_code == 0, done.output
    assert f"{spec}: 4 clauses kept, 0 broken, 0 not applicable" in done.output
    assert "not given" not in done.output


def test_others_break_something() -> None:
    done = check("torch.optim:SGD", "--lr", "1e-3", "--option", "momentum=0.9")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[0].startswith("torch.optim:SGD  torch ")
    (bad,) = (k for k, line in enumerate(lines) if "NaN in a gradient poisons" in line)
    assert lines[bad].split()[0] == "12"
    assert lines[bad].split()[-1] == "broken"
    assert "expected finite numbers after nan" in lines[bad + 1]


def test_what_is_not_given_is_said() -> None:
    done = check("torch.optim:Muon", "--lr", "1e-3", "--dtype", "float64")
    assert "not given: a parameter of shape [4], refused: ValueError: Muon only supports 2D" in done.output


def test_a_file_at_hand(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_optimizers.py").write_text("import torch\n\nclass Mine(torch.optim.AdamW):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    done = check("my_optimizers:Mine")
    assert done.exit_code == 1
    assert "my_optimizers:Mine: 60 clauses kept" in done.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["saop"], "'saop': no such optimizer (did you mean 'soap'?); others go by module:Class"),
        (["torch.optim:AdamV"], "torch.optim has no AdamV (did you mean 'Adam'?)"),
        (["torch.optimal:AdamW"], "No module named 'torch.optimal'"),
        (["torch:float32"], "torch:float32: is no class, but dtype"),
        (["soap", "--lr", "-1"], "lr=-1"),
        (["kfac", "--lr", "-1"], "lr=-1"),
        (["natural-gradient"], "no closure suits: with loss after backward, TypeError: the closure returned the loss"),
        (["soap", "--lr", "0.1", "--option", "betas"], 'option "betas": write it as'),
        (["soap", "--lr", "0.1", "--dtype", "float8"], "--dtype float8: there are float32, bfloat16, float64"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], complaint: str) -> None:
    done = check(*arguments)
    assert done.exit_code == 2
    (line,) = done.output.strip().splitlines()
    assert line.startswith("steepest: ")
    assert complaint in line
