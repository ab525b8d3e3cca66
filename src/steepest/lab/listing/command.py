"""The commands ``steepest optimizers`` and ``steepest routes``: all optimizers with their costs, a model's routing.

No figure in the list is copied from a paper. State is what a rule's ``init`` lays out, or what the first step of an
optimizer of torch.optim leaves; work is what `steepest.rule.work` counts.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.optimizer import Optimizer

import steepest
from steepest.engine.group import option_defaults
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import import_file
from steepest.optimizers import BY_CLOSURE, NAMES, group_options
from steepest.optimizers.torch_optim import PAPERS, TORCH
from steepest.recipes import RECIPES
from steepest.rule import Elementwise, Rule
from steepest.rule.work import PRODUCT, work
from steepest.rules import RULES
from steepest.stack.storage import laid_out

SIDE = 256  # rows and columns of the matrices on which work is counted
CLOSURE = "by closure"
UNUSUAL = {"lbfgs": CLOSURE, "sparseadam": "sparse gradients"}
"""The input of those optimizers that a step like the others' can't measure."""
FOOTNOTE = (
    "bytes: state per entry of a float32 matrix with m rows and n columns, if it is square and if n = 4m. products: "
    f"matrix products in an average step of a {SIDE}×{SIDE} matrix at default options; 1 is the product of two such "
    "matrices. decompositions: their FLOPs, divided by those of such a product; triangular solves count as cholesky. "
    "Through steepest.for_model, parameters that are no hidden matrices go to AdamW, with 8 bytes per entry."
)
PAPERS_HINT = "steepest optimizers --papers: where optimizers and recipes come from."


class Line(NamedTuple):
    """An optimizer in the list; None where a figure is not fixed."""

    name: str
    paper: str
    takes: str  # the parameters that it takes
    square: float | None  # state in bytes per entry of a square matrix
    wide: float | None  # state in bytes per entry of a matrix with four times as many columns as rows
    products: float | None  # matrix products in a step, in units of one of SIDE × SIDE matrices
    decompositions: str  # FLOPs of each kind of decomposition in the same units, such as "qr 0.53"


def print_optimizers(console: Console) -> None:
    """Print every optimizer that `steepest.create` knows with its costs, and the names of all recipes."""
    for title, lines in (("steepest", ours()), ("torch.optim", torchs())):
        shown = _table(f"\n{title}", ("bytes\nm=n", "bytes\nn=4m", "\nproducts"), ("\ndecompositions", "\ntakes"))
        for line in lines:
            figures = map(_short, (line.square, line.wide, line.products))
            shown.add_row(line.name, *figures, line.decompositions, line.takes)
        console.print(shown)
        console.print()
    for text in (FOOTNOTE, f"Recipes: {', '.join(RECIPES)}.", PAPERS_HINT):
        console.print(text, style="dim", highlight=False)


def print_papers(console: Console) -> None:
    """Print the publication of every optimizer that `steepest.create` knows, and of every recipe."""
    for title, lines in (("steepest", ours()), ("torch.optim", torchs())):
        shown = _table(title, (), ("paper",))
        for line in lines:
            shown.add_row(line.name, line.paper.replace("https://", ""))
        console.print(shown)
        console.print()
    recipes = _table("recipe", (), ("date", "source"))
    for one in RECIPES.values():
        recipes.add_row(one.name, one.date, one.source.replace("https://", ""))
    console.print(recipes)


def _table(title: str, numbers: tuple[str, ...], texts: tuple[str, ...]) -> Table:
    """Return an empty table with a column of names, columns of numbers, and texts that are folded."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown.add_column(title, no_wrap=True)
    for head in numbers:
        shown.add_column(head, justify="right", no_wrap=True)
    for head in texts:
        shown.add_column(head, overflow="fold")
    return shown


def print_routes(file: str, rule: str, console: Console) -> None:
    """Print the routing of the model that ``model()`` in a Python file makes.

    Raises:
        BadInput: if the file makes no model, or the model can't be routed.
    """
    built = build_model(Path(file))
    try:
        text = str(steepest.route(built, rule))
    except ValueError as error:
        raise BadInput(one_line(error)) from error
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def build_model(path: Path) -> nn.Module:
    """Return the module that ``model()`` in a Python file makes.

    Raises:
        BadInput: if it makes none.
    """
    make = getattr(import_file(path, "model file"), "model", None)
    if not callable(make):
        raise BadInput(f"model file {path}: defines no function model()")
    try:
        built = make()
    except Exception as error:
        raise BadInput(f"model file {path}: model() failed: {one_line(error)}") from error
    if not isinstance(built, nn.Module):
        raise BadInput(f"model file {path}: model() returned {type(built).__name__}, not a torch.nn.Module")
    return built


def ours() -> list[Line]:
    """Return the optimizers of this library; those with a class come first."""
    named = {entry.rule for entry in NAMES.values()}
    lines = []
    for name in (*NAMES, *(name for name in RULES if name not in named and name not in TORCH)):
        rule = _rule(name)
        paper, takes = (
            NAMES[name].paper if name in NAMES else rule.paper,
            "matrices" if isinstance(rule, Rule) else "any shape",
        )
        square, wide = (bytes_per_entry(name, 64, n) for n in (64, 256))
        lines.append(Line(name, paper, takes, square, wide, *cost(name)))
    for name, entry in BY_CLOSURE.items():
        lines.append(Line(name, entry.paper, CLOSURE, None, None, None, ""))
    return lines


def torchs() -> list[Line]:
    """Return the optimizers of torch.optim. A name that one of ours has, too, begins with "torch."."""
    lines = []
    for key, optimizer in sorted(TORCH.items()):
        name, paper = f"torch.{key}" if key in NAMES or key in BY_CLOSURE else key, PAPERS.get(key, "")
        if key in UNUSUAL:
            lines.append(Line(name, paper, UNUSUAL[key], None, None, None, ""))
            continue
        square, wide = (_bytes_left_by_a_step(optimizer, 64, n) / (64 * n) for n in (64, 256))
        takes, products = ("matrices", None) if key == "muon" else ("any shape", 0.0)
        lines.append(Line(name, paper, takes, square, wide, products, ""))
    return lines


def bytes_per_entry(name: str, m: int, n: int) -> float:
    """Return the bytes of state per entry of an m × n matrix under one of our optimizers. Nothing is allocated.

    >>> bytes_per_entry("soap", 64, 64), bytes_per_entry("muon", 64, 256)
    (24.0, 4.0)
    """
    rule = _rule(name)
    if isinstance(rule, Rule):
        state = dict(laid_out(rule, torch.empty(1, m, n, device="meta")))
    else:
        state = dict(rule.init(torch.empty(m, n, device="meta")))
        state.pop("step", None)  # ours keep one for each matrix too; it is the engine's
    return sum(tensor.nbytes for tensor in state.values()) / (m * n)


def cost(name: str) -> tuple[float, str]:
    """Return what an average step of one of ours does beside passes over the entries: `Line`'s last two figures.

    >>> cost("lion"), cost("moso")
    ((0.0, ''), (6.0, 'qr 1.3'))
    """
    rule = _rule(name)
    if not isinstance(rule, Rule):
        return 0.0, ""
    kinds: defaultdict[str, float] = defaultdict(float)
    for part, flops in work(rule, SIDE, SIDE).parts.items():
        kinds[part.kind] += flops / (2 * SIDE**3)
    return kinds.pop(PRODUCT, 0.0), ", ".join(f"{kind} {units:.2g}" for kind, units in kinds.items())


def _rule(name: str) -> Rule | Elementwise:
    """Return the rule of one of our optimizers at default options."""
    options = group_options(name, {})
    return RULES[options["rule"]].from_group(option_defaults(options["rule"]) | options)


def _bytes_left_by_a_step(optimizer: type[Optimizer], m: int, n: int) -> int:
    W = nn.Parameter(torch.ones(m, n))
    W.grad = torch.ones(m, n)
    stepping = optimizer([W], lr=1e-3)  # type: ignore[call-arg]
    stepping.step()
    return sum(x.nbytes for x in stepping.state[W].values() if isinstance(x, torch.Tensor) and x.dim() > 0)


def _short(number: float | None) -> str:
    """Format a number with at most one digit after the point; empty for None.

    >>> _short(24.0), _short(4.0625), _short(0.0), _short(None)
    ('24', '4.1', '0', '')
    """
    return "" if number is None else f"{number:.1f}".removesuffix(".0")
