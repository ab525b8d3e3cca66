"""Recipes: an optimizer with the settings of one publication, under a name that stays.

``"soap/paper"`` is SOAP as its authors ran it, ``"muon/keller"`` is Muon as its author released it. A recipe names its
source and the date of that source. What is not from there, or differs here, its note says. Settings don't change under
a name: later ones get a name of their own. All were compared with their sources once more in 2026-11.

Recipes go where optimizers' names go: `steepest.create`, `steepest.for_model`, overrides, and ``steepest race``.
Whatever the caller says goes before the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steepest.rule import nearest


@dataclass(frozen=True)
class Recipe:
    """Settings with their source.

    Example:
        >>> from steepest.recipes import RECIPES
        >>> muon = RECIPES["muon/keller"]
        >>> muon.optimizer, muon.options["lr"], muon.elementwise["lr"], muon.date
        ('muon', 0.02, 0.0003, '2024-12')
    """

    name: str
    optimizer: str
    """Whose options these are, as `steepest.create` calls it."""
    options: Mapping[str, Any]
    """As the optimizer's class takes them. A learning rate is among them where the source has one to recommend."""
    elementwise: Mapping[str, Any] | None
    """Options for what is no hidden matrix, as `steepest.for_model` takes them: learning rate and weight decay are
    those of ``options`` unless named here. None: ``options`` serve everything."""
    source: str
    """Where to read it: a paper or a project's public page."""
    date: str
    """Of the source: its year, and its month if it has one."""
    note: str
    """What differs from the source, and what is not from there."""

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        rest = "" if self.elementwise is None else f"\nthe rest: {dict(self.elementwise)}"
        return f"{self.name} ({self.date}, {self.source})\n{self.optimizer}: {settings}{rest}\n{self.note}"


KELLERS_ADAM = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10}
"""AdamW's part in K. Jordan's optimizer."""

UNGUARDED = {"momentum_floor": False, "noise_floor": 0.0, "kl_floor": 0.0, "match_columns": False}
"""SOAP without our guards in the first steps: what public implementations do."""

_ALL = (
    Recipe(
        "muon/keller",
        "muon",
        {
            "lr": 0.02,
            "momentum": 0.95,
            "nesterov": True,
            "scale": "original",
            "ns": "keller",
            "eps": 1e-7,
            "weight_decay": 0.0,
        },
        KELLERS_ADAM,
        "https://kellerjordan.github.io/posts/muon",
        "2024-12",
        "Defaults of the code that belongs to the post, https://github.com/KellerJordan/Muon; the example there decays "
        "by 0.01. It runs Newton-Schulz in bfloat16; here it is bfloat16 where that is fast. A record with the same "
        "code (2025-05) takes 0.05, and for AdamW 0.22 in the head, 0.6 in embeddings and 0.04 in vectors, with betas "
        "of 0.8 and 0.95.",
    ),
    Recipe(
        "muon/moonlight",
        "muon",
        {
            "momentum": 0.95,
            "nesterov": True,
            "scale": "match_rms_adamw",
            "ns": "keller",
            "eps": 1e-7,
            "weight_decay": 0.1,
        },
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "arXiv:2502.16982",
        "2025-02",
        "No learning rate: AdamW's carries over, which is the paper's point, and the rest shares it. Betas and eps "
        "of AdamW are from https://github.com/MoonshotAI/Moonlight, whose example takes 1e-3. There weight decay acts "
        "on vectors too; here it doesn't, unless decay_1d=True.",
    ),
    Recipe(
        "normuon/paper",
        "normuon",
        {"momentum": 0.95, "beta2": 0.95, "axis": "rows", "scale": "match_rms_adamw", "ns": "keller"},
        {"betas": (0.9, 0.95)},
        "arXiv:2510.05491",
        "2025-10",
        "No learning rate and no weight decay: the paper tunes both. Momentum looks ahead as in the authors' code, "
        'https://github.com/zichongli5/NorMuon, whose defaults otherwise are those of "muon/keller", the scale '
        '"original" among them; here it is the paper\'s. Betas of AdamW are from there.',
    ),
    Recipe(
        "soap/paper",
        "soap",
        {
            "lr": 3e-3,
            "betas": (0.95, 0.95),
            "shampoo_beta": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "precondition_frequency": 10,
            "basis_timing": "after",
            "correct_shampoo_beta_bias": False,
            "max_precond_dim": 10_000,
            **UNGUARDED,
        },
        {"betas": (0.95, 0.95), "eps": 1e-8},
        "arXiv:2409.11321",
        "2024-09",
        "Settings of the authors' code, https://github.com/nikhilvyas/SOAP. There convolutions have a covariance "
        "for each dimension; here they are flattened to matrices. Routing is ours: embeddings and heads run by "
        "AdamW.",
    ),
    Recipe(
        "soap/emerging",
        "soap",
        {
            "betas": (0.9, 0.95),
            "shampoo_beta": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "precondition_frequency": 1,
            "basis_timing": "before",
            "fp32_matmul_prec": "high",
            "qr_fp32_matmul_prec": "high",
            **UNGUARDED,
        },
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
        "2025",
        "The defaults of its SOAP, which asks for a learning rate. Our guards are off, for parity, and the first "
        "basis is computed in float64, there in float32. The elementwise part is ours.",
    ),
    Recipe(
        "shampoo/algoperf",
        "shampoo",
        {
            "lr": 1.749e-3,
            "betas": (0.9327, 0.9955),
            "shampoo_beta": 0.9955,
            "eps": 1e-8,
            "relative_eps": False,
            "exponent": -0.25,
            "graft": "adam",
            "graft_eps": 1e-8,
            "precondition_frequency": 100,
            "refresh": "eigh",
            "weight_decay": 0.0812,
        },
        {"betas": (0.9327, 0.9955), "eps": 1e-8},
        "arXiv:2309.06497; https://github.com/mlcommons/algorithms_results_v0.5",
        "2024-08",
        "The first of five settings that won AlgoPerf's external tuning, rounded. There Shampoo "
        "takes every parameter, in blocks of 1024; momentum is Nesterov's, as NAdam has it; roots are 100 steps "
        "old, and the first 100 steps are Adam's. Here matrices are whole, eigenvectors are as old but eigenvalues "
        "fresh, and the first step is Shampoo's. Schedule, label smoothing and dropout are not part of it.",
    ),
    Recipe(
        "dion/paper",
        "dion",
        {"lr": 0.01, "momentum": 0.95, "rank_fraction": 0.25, "scale": "mup", "weight_decay": 0.01},
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "arXiv:2504.05295",
        "2025-04",
        "Defaults of the authors' code, https://github.com/microsoft/dion, but for the rank: theirs is full, and a "
        "quarter is what they find nearly as good at 3B parameters. Their configuration for 160M takes a rate of "
        "0.02. They advise to divide the head's rate by the root of its input width: "
        'overrides={"head.weight": {"lr": ...}}. Their rest runs by AdamW or Lion.',
    ),
    Recipe(
        "dion2/paper",
        "dion2",
        {
            "lr": 0.01,
            "fraction": 0.25,
            "ef_decay": 0.95,
            "scale": "mup",
            "ns": "polar_express_dion",
            "eps": 1e-8,
            "weight_decay": 0.01,
        },
        {"betas": (0.9, 0.95), "eps": 1e-8},
        "arXiv:2512.16928",
        "2025-12",
        "Defaults of the authors' code, https://github.com/microsoft/dion, which they recommend over Dion; their "
        "configuration for 160M parameters takes a rate of 0.02 and a fraction of 0.5. The head's rate as in "
        '"dion/paper".',
    ),
    Recipe(
        "lion/paper",
        "lion",
        {"lr": 1e-4, "betas": (0.9, 0.99)},
        None,
        "arXiv:2302.06675",
        "2023-02",
        "The rate is the authors' example beside 1e-3 for AdamW, https://github.com/google/automl/tree/master/lion. "
        "Weight decay is left to you: 3 to 10 times AdamW's, they say, and for language models betas of 0.95 and 0.98.",
    ),
    Recipe(
        "adamw/nanogpt",
        "adamw",
        {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1},
        None,
        "https://github.com/karpathy/nanoGPT",
        "2023",
        "For GPT-2 of 124M parameters, with gradients clipped at norm 1, 2000 steps of warm-up and a cosine down "
        "to a tenth, which are not part of it. Through for_model, vectors don't decay, as there.",
    ),
)

RECIPES: Mapping[str, Recipe] = {r.name: r for r in _ALL}
"""Every recipe by name."""


def recipe(name: str) -> Recipe:
    """The recipe of this name: an optimizer's settings with their source.

    Args:
        name: As in `steepest.recipes.RECIPES`, such as "muon/moonlight" or "soap/paper".

    Raises:
        ValueError: For an unknown name; it suggests the nearest.

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
    """Whether a name has the form of a recipe's; optimizers' have no slash."""
    return "/" in name


def unfold(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A recipe's name as its optimizer's and all options, the given ones first; other names as they are.

    >>> unfold("lion/paper", {"lr": 1e-3})
    ('lion', {'lr': 0.001, 'betas': (0.9, 0.99)})
    >>> unfold("lion", {"lr": 1e-3})
    ('lion', {'lr': 0.001})
    """
    if not is_recipe(name):
        return name, dict(options)
    found = recipe(name)
    return found.optimizer, {**found.options, **options}


def unfold_elementwise(name: str, elementwise: Mapping[str, Any]) -> dict[str, Any]:
    """Options for what is no hidden matrix: the given ones, then the recipe's unless another rule is named.

    >>> unfold_elementwise("muon/keller", {"lr": 1e-3})
    {'lr': 0.001, 'betas': (0.9, 0.95), 'eps': 1e-10}
    >>> unfold_elementwise("muon/keller", {"rule": "lion"})
    {'rule': 'lion'}
    """
    theirs = (recipe(name).elementwise if is_recipe(name) else None) or {}
    same = elementwise.get("rule", "adamw") == theirs.get("rule", "adamw")
    return {**(theirs if same else {}), **elementwise}
