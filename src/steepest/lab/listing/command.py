"""The commands ``steepest optimizers`` and ``steepest routes``: all optimizers with their costs, a model's routing.

No figure in the list is copied from a paper. State is what a rule's ``init`` lays out, or what the first step of an
optimizer of torch.optim leaves; work is counted while a step is taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

import steepest
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.shared.files import import_file
from steepest.optimizers import NAMES, group_options
from steepest.optimizers.torch_optim import PAPERS, TORCH
from steepest.recipes import RECIPES
from steepest.routing.judge import state_bytes
from steepest.rule import Rule
from steepest.rules import RULES
from steepest.stack.storage import laid_out

SIDE = 256
"""Work is counted on matrices of so many rows and columns."""
WARM_STEPS = 2
"""Steps before the one that is counted: the first ones are special."""
DECOMPOSITIONS = {
    "geqrf": "QR",
    "linalg_qr": "QR",
    "_linalg_eigh": "eigh",
    "_linalg_svd": "SVD",
    "linalg_cholesky_ex": "Cholesky",
    "linalg_solve_triangular": "solve",
}
UNUSUAL = {"lbfgs": "any shape, by a closure", "sparseadam": "sparse gradients"}
"""The input of those optimizers that a step like the others' can't measure."""
FOOTNOTE = (
    "m=n, n=4m: bytes of state per entry of a float32 matrix m × n. products: what one step multiplies, for a matrix "
    f"of {SIDE}×{SIDE}, in units of one product of two such matrices; decompositions and solves come beside them, "
    "/ 5 in every fifth step. On the average, at default options. Through steepest.for_model, what is no hidden matrix "
    "goes to AdamW: 8 bytes per entry."
)


@dataclass(frozen=True)
class Cost:
    """What a step does beside passes over the entries."""

    products: float
    """Matrix products, in units of one of `SIDE` × `SIDE` matrices."""
    decompositions: str
    """Such as "2 QR", or "2 QR / 5" for as many in every fifth step."""


@dataclass(frozen=True)
class Line:
    """An optimizer in the list."""

    name: str
    paper: str
    takes: str
    """The parameters that it takes."""
    square: float | None
    """State in bytes per entry of a square matrix; None where that is not fixed."""
    wide: float | None
    """State in bytes per entry of a matrix with four times as many columns as rows."""
    cost: Cost | None


def print_optimizers(console: Console) -> None:
    """Print every optimizer that `steepest.create` knows, and every recipe."""
    for title, lines in (("steepest", ours()), ("torch.optim", torchs())):
        shown = _table(title, ("m=n", "n=4m", "products"), ("and", "takes", "paper"))
        for line in lines:
            work = ("", "") if line.cost is None else (_short(line.cost.products), line.cost.decompositions)
            paper = line.paper.replace("https://", "")
            shown.add_row(line.name, _short(line.square), _short(line.wide), *work, line.takes, paper)
        console.print(shown)
    console.print(FOOTNOTE, style="dim", highlight=False)
    console.print()
    recipes = _table("recipes", (), ("date", "source"))
    for one in RECIPES.values():
        recipes.add_row(one.name, one.date, one.source)
    console.print(recipes)


def _table(title: str, numbers: tuple[str, ...], texts: tuple[str, ...]) -> Table:
    """Return an empty table with a column of names, columns of numbers, and texts that are folded."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
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
    names = [*NAMES, *(name for name in RULES if name not in NAMES and name not in TORCH)]
    return [_our_line(name) for name in names]


def torchs() -> list[Line]:
    """Return the optimizers of torch.optim. A name that one of ours has, too, begins with "torch."."""
    return [_torch_line(name) for name in sorted(TORCH)]


def bytes_per_entry(name: str, m: int, n: int) -> float:
    """Return the bytes of state per entry of an m × n matrix under one of our optimizers. Nothing is allocated.

    >>> bytes_per_entry("soap", 64, 64), bytes_per_entry("muon", 64, 256)
    (24.0, 4.0)
    """
    options = group_options(name, {})
    rule = RULES[options.pop("rule")]
    if not issubclass(rule, Rule):
        state: dict[str, torch.Tensor] = dict(rule(**options).init(torch.empty(m, n, device="meta")))
        state.pop("step", None)  # ours keep one for each matrix too; it is the engine's
    elif not options:
        return state_bytes(rule.name, [(1, m, n)]) / (m * n)
    else:
        state = dict(laid_out(rule(**options), torch.empty(1, m, n, device="meta")))
    return sum(tensor.nbytes for tensor in state.values()) / (m * n)


def cost(name: str) -> Cost:
    """What a step by one of ours costs on the average, counted while all of a period are taken.

    >>> cost("lion")
    Cost(products=0.0, decompositions='')
    """
    generator = torch.Generator().manual_seed(0)
    W = nn.Parameter(torch.zeros(SIDE, SIDE))
    optimizer = steepest.create(name, [W], lr=1e-3)
    period = int(optimizer.param_groups[0].get("precondition_frequency", 1))

    def steps(count: int) -> None:
        for _ in range(count):
            W.grad = torch.randn(SIDE, SIDE, generator=generator)
            optimizer.step()

    steps(WARM_STEPS)
    in_place = {torch.ops.aten.baddbmm_: _product}  # torch counts only those that make a new tensor
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops, _Decompositions() as seen:
        steps(period)
    every = f" / {period}" if period > 1 and seen.count else ""
    return Cost(flops.get_total_flops() / (2 * SIDE**3) / period, f"{seen}{every}")


def _product(_: Any, a: torch.Size, b: torch.Size, **__: Any) -> int:
    """FLOPs of a batched product, from its factors' shapes."""
    return 2 * a.numel() * b[-1]


class _Decompositions(TorchDispatchMode):
    """Counts them, matrix by matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[str] = Counter()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = DECOMPOSITIONS.get(func.overloadpacket.__name__)
        if kind is not None:
            self.count[kind] += args[0].shape[:-2].numel()
        return func(*args, **(kwargs or {}))

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.count.items())


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
