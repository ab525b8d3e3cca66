"""A device whose speeds are small primes, and models of a few weights: plans that one can reckon by hand."""

from __future__ import annotations

import math
from dataclasses import replace

from typer.testing import CliRunner

from steepest.cli import app
from steepest.lab.plan.devices import Device
from steepest.lab.plan.models import Model, Weight
from steepest.lab.plan.plan import look, mesh
from steepest.rules.adamw import AdamW
from steepest.view import View

FLAT = {"highest": 2.0, "high": 3.0, "medium": 5.0, "bfloat16": 7.0}
FLAT |= {"qr": 11.0, "cholesky": 13.0, "eigh": 17.0, "svd": 19.0}
DEVICE = Device(
    name="made up",
    kind="cpu",
    speeds={name: ((1, speed),) for name, speed in FLAT.items()},
    bandwidth=23.0,
    entrywise=29.0,
    passes=31.0,
    per_stack=1000.0,
    per_matrix=100.0,
    training=37.0,
    memory=1e6,
)
FREE = replace(DEVICE, bandwidth=math.inf, entrywise=math.inf, passes=math.inf, per_stack=0.0, per_matrix=0.0)
"""Where only products and decompositions take time."""
FILES = {
    "mixed": """
from torch import nn
def model():
    return nn.Sequential(
        nn.Embedding(300, 64), nn.Linear(64, 160), nn.Conv2d(8, 24, 3), nn.Linear(160, 100), nn.Linear(100, 10)
    )
""",
    "gpt": """
from steepest.lab.workloads.gpt import GPT
def model():
    return GPT(vocabulary=90, context=32, d=48, depth=2)
""",
}


def steepest_plan(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


def model_of(rule, *shapes: tuple[int, int], vectors: int = 0) -> Model:
    weights = [Weight(f"w{k}", shape, View(shape), 4) for k, shape in enumerate(shapes)]
    weights += [Weight("b", (vectors,), None, 4)] * (vectors > 0)
    return Model("made up", tuple(weights), "", rule, AdamW())


def predict(rule, *shapes: tuple[int, int], vectors: int = 0, on: str = "fsdp", world: int = 1, device=DEVICE, mfu=0.5):
    found = look(model_of(rule, *shapes, vectors=vectors), mesh(on, world), 10, device=device, mfu=mfu).forecast
    assert found is not None
    return found
