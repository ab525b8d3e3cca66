"""What the command line lists: figures that are counted, and routings of models from files."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.listing.command import build_model, bytes_per_entry, cost, ours, torchs
from steepest.lab.shared.errors import BadInput
from steepest.optimizers import BY_CLOSURE, NAMES
from steepest.optimizers.torch_optim import TORCH
from steepest.recipes import RECIPES
from steepest.rules import RULES

MODEL = """
from torch import nn

def model():
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11))
"""


def steepest(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})


@pytest.mark.parametrize(
    ("name", "square", "wide"),
    [
        ("soap", 24.0, 8 + 8 * (1 + 16) / 4),
        ("muon", 4.0, 4.0),
        ("lion", 4.0, 4.0),
        ("moso", 20.0, 12 + 8 / 4),
        ("kl-shampoo", 24 + 8 / 64, 8 + 8 * (1 + 16) / 4 + 4 * (64 + 256) / (64 * 256)),
    ],
)
def test_state_is_what_the_readme_says(name, square, wide) -> None:
    assert bytes_per_entry(name, 64, 64) == square
    assert bytes_per_entry(name, 64, 256) == wide


def test_work_is_what_the_formulas_say() -> None:
    """The costs of docs/which-optimizer.md at s = l, in units of a product, 2 s³.

    SOAP takes 12 s³ and at a refresh 12 s³ and two QR decompositions of 8/3 s³, Muon 30 s³.
    """
    assert cost("soap") == (pytest.approx((12 + (2 * 2 + 8) / 5) / 2), "qr 0.53")
    assert cost("muon") == (30 / 2, "")
    assert cost("moso") == ((10 + 2) / 2, "qr 1.3")
    assert cost("rekls")[1] == "eigh 9"


def test_everything_that_has_a_name_is_listed() -> None:
    names = [line.name for line in [*ours(), *torchs()]]
    assert len(names) == len(set(names))
    assert set(names) == NAMES.keys() | BY_CLOSURE.keys() | TORCH.keys() | {"torch.muon", "torch.lbfgs"}
    assert RULES.keys() <= {entry.rule for entry in NAMES.values()} | set(names)
    assert all(line.paper for line in [*ours(), *torchs()])
    assert [line.name for line in torchs() if line.square is None] == ["torch.lbfgs", "sparseadam"]
    measured = {line.name: line.square for line in torchs()}
    assert (measured["adamw"], measured["sgd"], measured["adagrad"]) == (8, 0, 4)


@pytest.mark.parametrize("columns", [80, 140])
def test_every_optimizer_has_one_line_of_costs_and_its_paper(columns) -> None:
    typed = CliRunner().invoke, app, {"COLUMNS": str(columns)}
    costs, papers = (typed[0](app, words, env=typed[2]) for words in (["optimizers"], ["optimizers", "--papers"]))
    assert costs.exit_code == papers.exit_code == 0, costs.output + papers.output
    table, said = costs.output.split("bytes: state per entry")
    rows = [line for line in table.splitlines() if line.strip() and "─" not in line]
    heads = 2 * 2  # two tables, whose heads have two lines
    assert len(rows) == heads + len(ours()) + len(torchs())
    for name in [*NAMES, *BY_CLOSURE, *TORCH]:
        assert any(row.startswith(f"{name} ") for row in rows)
        assert f"\n{name} " in papers.output
    for recipe in RECIPES.values():
        assert recipe.name in " ".join(said.split())
        assert f"\n{recipe.name} " in papers.output
        assert recipe.source.replace("https://", "") in " ".join(papers.output.split())
    assert "arXiv:2409.11321" in papers.output


@pytest.mark.parametrize(("rule", "named"), [("soap", "soap"), ("muon/keller", "muon")])
def test_the_routing_of_a_file_is_printed(tmp_path, rule, named) -> None:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    done = steepest("routes", path, "--rule", rule)
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.output.splitlines() if line[:1].isdigit()}
    assert f" {named} " in rows["1.weight"]
    assert " adamw " in rows["0.weight"]
    assert f"{named}: 1 parameters" in done.output


@pytest.mark.parametrize(
    ("source", "options", "complaint"),
    [
        (None, [], "no such file"),
        ("import nonsense_that_is_nowhere", [], "No module named"),
        ("x = 1", [], "defines no function model()"),
        ("def model(): raise ValueError('no data')", [], "model() failed: no data"),
        ("def model(): return 3", [], "model() returned int, not a torch.nn.Module"),
        (MODEL, ["--rule", "saop"], "no such rule (did you mean 'soap'?)"),
        (MODEL.replace("nn.Linear(8, 16)", "nn.LazyLinear(16)"), [], "lazy"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_input_gets_one_clear_line_and_status_2(tmp_path, source, options, complaint) -> None:
    path = tmp_path / "net.py"
    if source is not None:
        path.write_text(source)
    done = steepest("routes", path, *options)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert complaint in line
    assert done.stdout == ""


def test_a_file_that_is_no_python_is_refused(tmp_path) -> None:
    path = tmp_path / "net.txt"
    path.write_text(MODEL)
    with pytest.raises(BadInput, match=r"must be a Python file, \*\.py"):
        build_model(path)
