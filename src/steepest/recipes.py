"""Recipes: optimizers with the settings of a publication, by name.

``"soap/paper"`` is SOAP as its authors ran it, ``"muon/keller"`` is Muon as its author released it. A recipe names its
source, the date of that source, and in a note every difference from it. The settings of a name never change; later
settings get a new name. All recipes were compared with their sources again in 2026-11.

`steepest.create`, `steepest.for_model`, overrides of `steepest.route` and ``steepest race`` take recipes by name. The
caller's options take precedence over a recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steepest.rule import nearest
from steepest.rules.aliases import TARGETS


@dataclass(frozen=True)
class Recipe:
    """A recipe holds the settings of an optimizer and their source.

    Example:
        >>> from steepest.recipes import RECIPES
        >>> muon = RECIPES["muon/keller"]
        >>> muon.optimizer, muon.options["lr"], muon.elementwise["lr"], muon.date
        ('muon', 0.02, 0.0003, '2024-12')
    """

    name: str
    optimizer: str
    """The optimizer's name, as `steepest.create` takes it."""
    options: Mapping[str, Any]
    """Arguments of the optimizer's class. ``lr`` is among them if the source recommends one."""
    elementwise: Mapping[str, Any] | None
    """Options for all parameters but hidden matrices, as `steepest.for_model` takes them: ``lr`` and ``weight_decay``
    default to those of ``options``. None if ``options`` hold for all parameters."""
    source: str
    """A paper or a project's public page."""
    date: str
    """The year of the source, and its month if known."""
    note: str
    """How the settings differ from the source, and which ones come from elsewhere."""

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        rest = "" if self.elementwise is None else f"\nthe rest: {dict(self.elementwise)}"
        return f"{self.name} ({self.date}, {self.source})\n{self.optimizer}: {settings}{rest}\n{self.note}"


UNGUARDED = {"guards": False, "match_columns": False}
"""SOAP without the guards of the first steps, as public implementations run it."""

# fmt: off
# A recipe is laid out as names, settings, elementwise settings, source, note.
_ALL = (
    Recipe("muon/keller", "muon",
        {"lr": 0.02, "momentum": 0.95, "nesterov": True, "scale": "original", "ns": "keller", "eps": 1e-7,
         "weight_decay": 0.0},
        {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10},
        "https://kellerjordan.github.io/posts/muon", "2024-12",
        "Defaults of the post's code, https://github.com/KellerJordan/Muon, whose example decays by 0.01. It runs "
        "Newton-Schulz in bfloat16, here only where bfloat16 is fast. A record with the same code (2025-05) takes a "
        "rate of 0.05, and for AdamW 0.22 in the head, 0.6 in embeddings and 0.04 in vectors, with betas of 0.8 and "
        "0.95."),
    Recipe("muon/moonlight", "muon",
        {"momentum": 0.95, "nesterov": True, "scale": "match_rms_adamw", "ns": "keller", "eps": 1e-7,
         "weight_decay": 0.1},
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "arXiv:2502.16982", "2025-02",
        "No learning rate: the paper's point is that AdamW's carries over, for all parameters. AdamW's betas and eps "
        "are from https://github.com/MoonshotAI/Moonlight, whose example takes a rate of 1e-3. There weight decay acts "
        "on vectors too; here it does with decay_1d=True."),
    Recipe("normuon/paper", "normuon",
        {"momentum": 0.95, "beta2": 0.95, "axis": "rows", "scale": "match_rms_adamw", "ns": "keller"},
        {"betas": (0.9, 0.95)},
        "arXiv:2510.05491", "2025-10",
        "No learning rate and no weight decay: the paper tunes both. Nesterov momentum and AdamW's betas are from the "
        "authors' code, https://github.com/zichongli5/NorMuon. Its other defaults are those of Muon's author, scale "
        "included; here the scale is the paper's."),
    Recipe("soap/paper", "soap",
        {"lr": 3e-3, "betas": (0.95, 0.95), "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01,
         "precondition_frequency": 10, "basis_timing": "after", "correct_shampoo_beta_bias": False,
         "max_precond_dim": 10_000, **UNGUARDED},
        {"betas": (0.95, 0.95), "eps": 1e-8},
        "arXiv:2409.11321", "2024-09",
        "Settings of the authors' code, https://github.com/nikhilvyas/SOAP. There convolutions have a covariance for "
        "each dimension; here they are flattened to matrices. Here embeddings and heads are optimized by AdamW."),
    Recipe("soap/emerging", "soap",
        {"betas": (0.9, 0.95), "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01, "precondition_frequency": 1,
         "basis_timing": "before", "fp32_matmul_prec": "high", "qr_fp32_matmul_prec": "high", **UNGUARDED},
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "https://github.com/NVIDIA-NeMo/Emerging-Optimizers", "2025",
        "Defaults of its SOAP, which has none for the learning rate. Guards are off, for parity. The first basis is "
        "computed in float64, there in float32. The elementwise options are not from there."),
    Recipe("shampoo/algoperf", "shampoo",
        {"lr": 1.749e-3, "betas": (0.9327, 0.9955), "shampoo_beta": 0.9955, "eps": 1e-8, "relative_eps": False,
         "exponent": -0.25, "graft": "adam", "graft_eps": 1e-8, "precondition_frequency": 100, "solver": "eigh",
         "weight_decay": 0.0812},
        {"betas": (0.9327, 0.9955), "eps": 1e-8},
        "arXiv:2309.06497; https://github.com/mlcommons/algorithms_results_v0.5", "2024-08",
        "The first of five settings that won AlgoPerf's external tuning, rounded. There Shampoo takes every parameter, "
        "in blocks of 1024; momentum is Nesterov's, as in NAdam; roots are up to 100 steps old, and the first 100 "
        "steps are Adam's. Here matrices are whole, eigenvectors are up to 100 steps old but eigenvalues current, and "
        "the first step is Shampoo's. Schedule, label smoothing and dropout are not included."),
    Recipe("dion/paper", "dion",
        {"lr": 0.01, "momentum": 0.95, "rank_fraction": 0.25, "scale": "mup", "weight_decay": 0.01},
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "arXiv:2504.05295", "2025-04",
        "Defaults of the authors' code, https://github.com/microsoft/dion, except for the rank: theirs is full, and "
        "they find a quarter nearly as good at 3B parameters. Their configuration for 160M takes a rate of 0.02. They "
        "recommend to divide the head's rate by the square root of its input width: "
        'overrides={"head.weight": {"lr": ...}}. They optimize the other parameters by AdamW or Lion.'),
    Recipe("dion2/paper", "dion2",
        {"lr": 0.01, "fraction": 0.25, "ef_decay": 0.95, "scale": "mup", "ns": "polar_express_dion", "eps": 1e-8,
         "weight_decay": 0.01},
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "arXiv:2512.16928", "2025-12",
        "Defaults of the authors' code, https://github.com/microsoft/dion, which recommends it over Dion; the "
        "configuration for 160M parameters takes a rate of 0.02 and a fraction of 0.5. For the head's rate see "
        '"dion/paper".'),
    Recipe("lion/paper", "lion",
        {"lr": 1e-4, "betas": (0.9, 0.99)},
        None,
        "arXiv:2302.06675", "2023-02",
        "The rate is the authors' example where AdamW has 1e-3, https://github.com/google/automl/tree/master/lion. "
        "Weight decay is not set: they recommend 3 to 10 times AdamW's; for language models, betas of 0.95 and 0.98."),
    Recipe("adamw/nanogpt", "adamw",
        {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1},
        None,
        "https://github.com/karpathy/nanoGPT", "2023",
        "For GPT-2 of 124M parameters, with gradients clipped at norm 1, 2000 steps of warm-up and a cosine decay to a "
        "tenth, which are not included. With for_model, vectors don't decay, as there."),
)
# fmt: on

RECIPES: Mapping[str, Recipe] = {r.name: r for r in _ALL}
"""All recipes by name."""


def recipe(name: str) -> Recipe:
    """Return the recipe of this name: an optimizer's settings with their source.

    Args:
        name: A name of `steepest.recipes.RECIPES`, such as "muon/moonlight" or "soap/paper", in any case.

    Raises:
        ValueError: If there is no such recipe; the message suggests the nearest name.

    Example:
        >>> recipe("soap/paper").source
        'arXiv:2409.11321'
        >>> print(recipe("lion/paper"))
        lion/paper (2023-02, arXiv:2302.06675)
        lion: lr=0.0001, betas=(0.9, 0.99)
        The rate ...
        >>> recipe("muon/kellr")
        Traceback (most recent call last):
        ValueError: name='muon/kellr': no such recipe (did you mean 'muon/keller'?)
    """
    key = name.lower()
    if key not in RECIPES:
        raise ValueError(f"name={name!r}: no such recipe{nearest(key, RECIPES)}")
    return RECIPES[key]


def is_recipe(name: str) -> bool:
    """Return whether a name is that of a recipe: names of optimizers have no slash."""
    return "/" in name


def unfold(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return an optimizer's name and options for a recipe's; the given options take precedence.

    Names of optimizers are returned as they are.

    >>> unfold("lion/paper", {"lr": 1e-3})
    ('lion', {'lr': 0.001, 'betas': (0.9, 0.99)})
    >>> unfold("lion", {"lr": 1e-3})
    ('lion', {'lr': 0.001})
    """
    if not is_recipe(name):
        return name, dict(options)
    found = recipe(name)
    meant = {target for alias in options for target in TARGETS.get(alias, ())}
    return found.optimizer, {k: v for k, v in found.options.items() if k not in meant} | dict(options)


def unfold_elementwise(name: str, elementwise: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for all parameters but hidden matrices: the given ones, then the recipe's.

    The recipe's are left out if the given ones name another rule.

    >>> unfold_elementwise("muon/keller", {"lr": 1e-3})
    {'lr': 0.001, 'betas': (0.9, 0.95), 'eps': 1e-10}
    >>> unfold_elementwise("muon/keller", {"rule": "lion"})
    {'rule': 'lion'}
    """
    settings = (recipe(name).elementwise if is_recipe(name) else None) or {}
    same_rule = elementwise.get("rule", "adamw") == settings.get("rule", "adamw")
    return {**(settings if same_rule else {}), **elementwise}
