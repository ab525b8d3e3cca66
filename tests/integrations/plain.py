"""A model, its data, and the loop that a host's training is compared with, to the last bit."""

import importlib
import sys
import warnings
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import steepest

STEPS, BATCH, VOCABULARY = 6, 4, 64
OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "elementwise": {"lr": 1e-3}}


def host(*names):
    """Return a host's modules, or skip the file where one isn't installed. Their own warnings are none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [pytest.importorskip(name) for name in names]
    return found[0] if len(found) == 1 else found


@contextmanager
def beside(integration, hook, **members):
    """Import an integration beside its host's module ``hook``, or, where that isn't installed, beside a stand-in.

    The stand-in has ``members`` only, and is gone afterwards.
    """
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(hook)
        except ImportError:
            parts = hook.split(".")
            made = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            sys.modules.update({name: ModuleType(name) for name in made})
            vars(sys.modules[hook]).update(members)
        sys.modules.pop(f"steepest.integrations.{integration}", None)  # a doctest collector may have left half
        imported = importlib.import_module(f"steepest.integrations.{integration}")
    yield imported
    for name in [*made, imported.__name__] if made else []:
        del sys.modules[name]


class Model(nn.Module):
    """A small language model that returns its loss, as trainers expect."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, tokens, labels):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return {"loss": cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def examples(count=STEPS * BATCH * 2):
    """Return as many examples, each a dict; the same at every call."""
    tokens = torch.randint(VOCABULARY, (count, 9), generator=torch.Generator().manual_seed(1))
    return [{"tokens": row[:-1], "labels": row[1:]} for row in tokens]


def batches(data, size=BATCH):
    """Return batches of examples in their order."""
    return [
        {key: torch.stack([row[key] for row in data[i : i + size]]) for key in data[0]}
        for i in range(0, len(data), size)
    ]


def train(net, optimizer, scheduler=None, *, accumulation=1, clip=None, dtype=None, in_groups=False, after=None):
    """Train as any plain loop does."""
    data = batches(examples())
    for step in range(STEPS):
        for batch in data[step * accumulation : (step + 1) * accumulation]:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = net(**batch)["loss"]
            (loss / accumulation).backward()
        if clip is not None:
            ours = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(ours if in_groups else net.parameters(), clip)  # the order rounds the norm
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        if after is not None:
            after(step + 1)
    return net


def told(every, **how):
    """Return the diagnostics of a plain loop after every so many steps."""
    net, found = model(), {}
    optimizer = optimizer_of(net)

    def ask(step):
        if step % every == 0:
            found[step] = optimizer.diagnostics()

    train(net, optimizer, falling(optimizer), after=ask, **how)
    return found


def optimizer_of(net, name="soap", **options):
    return steepest.for_model(net, name, **(OPTIONS | options))


def falling(optimizer):
    """Return a scheduler of torch, under which every step has another learning rate."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def assert_same(net, other):
    theirs = other.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(value, theirs[name]), f"{name}: {(value - theirs[name]).abs().max()}"
    assert not torch.equal(net.embed.weight, model().embed.weight)  # it was trained at all


def assert_same_state(optimizer, other):
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for key, entries in mine.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key][name])), f"{key}: {name}"
