"""What ``steepest optimizers`` and ``steepest routes`` print: every optimizer with its costs, and a model's routing.

Nothing in the list is copied from a paper: state is what a rule's ``init`` lays out (torch.optim's: what the first step
leaves), work is what `steepest.rule.work` counts.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from steepest.optimizers import NAMES, group_options
from steepest.optimizers.torch_optim import PAPERS, TORCH
from steepest.recipes import RECIPES
from steepest.rule import Rule
from steepest.rule.work import PRODUCT, work
from steepest.rules import RULES
from steepest.stack.storage import laid_out

SIDE = 256
"""Rows and columns of the matrix for which work is counted."""
UNUSUAL = {
    "lbfgs": "any shape, by a closure",
    "sparseadam": "sparse gradients",
}
"""What those take that can't be measured by a step like the others'."""
FOOTNOTE = (
    "m=n, n=4m: bytes of state per entry of a float32 matrix m × n. products: what one step multiplies, for a matrix "
    f"of {SIDE}×{SIDE}, in units of one product of two such matrices; FLOPs of decompositions come beside them, in the "
    "same units, those of triangular solves as cholesky. On the average, at default options. Through "
    "steepest.for_model, what is no hidden matrix goes to AdamW: 8 bytes per entry."
)


@dataclass(frozen=True)
class Cost:
    """What a step does beside passes over the entries."""

    products: float
    """Matrix products, in units of one of `SIDE` × `SIDE` matrices."""
    decompositions: str
    """FLOPs of each kind of decomposition in the same units, such as "qr 0.53"."""


@dataclass(frozen=True)
class Line:
    """One optimizer."""

    name: str
    paper: str
    takes: str
    """What it is for."""
    square: float | None
    """State, in bytes per entry of a square matrix; None where that is not fixed."""
    wide: float | None
    """The same for four times as many columns as rows."""
    cost: Cost | None


def print_optimizers(console: Console) -> None:
    """Print every optimizer that `steepest.create` knows, and every recipe."""
    for title, lines in (("steepest", ours()), ("torch.optim", torchs())):
        console.print(_table(title, lines))
    console.print(FOOTNOTE, style="dim", highlight=False)
    console.print()
    console.print(_recipes())


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
    """What ``model()`` in the file returns; BadInput unless that is a module."""
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
    """The optimizers of this library, those first that have a class."""
    named = {entry.rule for entry in NAMES.values()}
    names = [*NAMES, *(name for name in RULES if name not in named and name not in TORCH)]
    return [_our_line(name) for name in names]


def torchs() -> list[Line]:
    """torch.optim's; those that ours hide behind the same name go by "torch." and theirs."""
    return [_torch_line(name) for name in sorted(TORCH)]


def bytes_per_entry(name: str, m: int, n: int) -> float:
    """What one of ours keeps for an m × n matrix; nothing is allocated.

    >>> bytes_per_entry("soap", 64, 64), bytes_per_entry("muon", 64, 256)
    (24.0, 4.0)
    """
    options = group_options(name, {})
    rule = RULES[options["rule"]].from_group(option_defaults(options["rule"]) | options)
    if isinstance(rule, Rule):
        state = dict(laid_out(rule, torch.empty(1, m, n, device="meta")))
    else:
        state = dict(rule.init(torch.empty(m, n, device="meta")))
        state.pop("step", None)  # ours keep one for each matrix too; it is the engine's
    return sum(tensor.nbytes for tensor in state.values()) / (m * n)


def cost(name: str) -> Cost:
    """The work of an average step of one of ours at default options.

    >>> cost("lion"), cost("moso")
    (Cost(products=0.0, decompositions=''), Cost(products=6.0, decompositions='qr 1.3'))
    """
    options = group_options(name, {})
    rule = RULES[options.pop("rule")](**options)
    if not isinstance(rule, Rule):
        return Cost(0.0, "")
    kinds: defaultdict[str, float] = defaultdict(float)
    for part, flops in work(rule, SIDE, SIDE).parts.items():
        kinds[part.kind] += flops / (2 * SIDE**3)
    products = kinds.pop(PRODUCT, 0.0)
    return Cost(products, ", ".join(f"{kind} {units:.2g}" for kind, units in kinds.items()))


def _our_line(name: str) -> Line:
    options = group_options(name, {})
    rule = RULES[options["rule"]]
    paper = NAMES[name].paper if name in NAMES else rule.paper
    applies = "matrices" if issubclass(rule, Rule) else "any shape"
    return Line(name, paper, applies, bytes_per_entry(name, 64, 64), bytes_per_entry(name, 64, 256), cost(name))


def _torch_line(key: str) -> Line:
    name, paper = f"torch.{key}" if key in NAMES else key, PAPERS.get(key, "")
    if key in UNUSUAL:
        return Line(name, paper, UNUSUAL[key], None, None, None)
    square, wide = (_bytes_left_by_a_step(TORCH[key], m, n) / (m * n) for m, n in ((64, 64), (64, 256)))
    if key == "muon":
        return Line(name, paper, "matrices", square, wide, None)
    return Line(name, paper, "any shape", square, wide, Cost(0.0, ""))


def _bytes_left_by_a_step(optimizer: type[Optimizer], m: int, n: int) -> int:
    W = nn.Parameter(torch.ones(m, n))
    with_rate = inspect.signature(optimizer).parameters["lr"].default is inspect.Parameter.empty
    options: dict[str, Any] = {"lr": 1e-3} if with_rate else {}
    stepping = optimizer([W], **options)
    W.grad = torch.ones(m, n)
    stepping.step()
    tensors = [x for x in stepping.state[W].values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in tensors if x.dim() > 0)


def _table(title: str, lines: list[Line]) -> Table:
    grid = _grid(title)
    for heading in ("m=n", "n=4m", "products"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for heading in ("and", "takes", "paper"):
        grid.add_column(heading, overflow="fold")
    for line in lines:
        work = ("", "") if line.cost is None else (_short(line.cost.products), line.cost.decompositions)
        paper = line.paper.replace("https://", "")
        grid.add_row(line.name, _short(line.square), _short(line.wide), *work, line.takes, paper)
    return grid


def _recipes() -> Table:
    grid = _grid("recipes")
    grid.add_column("date")
    grid.add_column("source")
    for r in RECIPES.values():
        grid.add_row(r.name, r.date, r.source)
    return grid


def _grid(title: str) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    grid.add_column(title, no_wrap=True)
    return grid


def _short(number: float | None) -> str:
    """At most one digit after the point, and nothing for what is not known.

    >>> _short(24.0), _short(4.0625), _short(0.0), _short(None)
    ('24', '4.1', '0', '')
    """
    return "" if number is None else f"{number:.1f}".removesuffix(".0")
