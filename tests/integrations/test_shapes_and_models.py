"""Routing by shapes alone, compared with that of `steepest.for_model`, which sees the modules, entry by entry."""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
import zoo_models

import steepest
from steepest.integrations import ByShape

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:ByShape:UserWarning")

DOCS = Path(__file__).parents[2] / "docs" / "hosts.md"
TINY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {
    "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 1000,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def of(family, **settings):
    """Return a maker of a model of transformers, with weights drawn at random."""
    kind = getattr(transformers, family)
    return lambda: kind(kind.config_class(**settings))


def in_full(make):
    """Return a maker on the meta device, where a model of any size has shapes, and no weights."""

    def made():
        with torch.device("meta"):
            return make()

    return made


ALIKE = {
    "GPT-2, 124M": in_full(of("GPT2LMHeadModel")),
    "GPT-2, 2 layers": of("GPT2LMHeadModel", n_layer=2, n_embd=64, n_head=4),
    "Llama, 7B": in_full(of("LlamaForCausalLM")),
    "Llama, 2 layers, grouped queries": of("LlamaForCausalLM", num_key_value_heads=2, **TINY),
    "Llama, 2 layers, 1000 tokens": of("LlamaForCausalLM", num_key_value_heads=2, vocab_size=1000, **TINY),
    "ViT-B": in_full(of("ViTForImageClassification", num_labels=1000)),
    "ViT, 2 layers": of("ViTForImageClassification", image_size=32, patch_size=8, num_labels=10, **TINY),
    "U-Net": zoo_models.unet,
    "U-Net of a diffusion model": zoo_models.diffusion_unet,
    "LoRA": zoo_models.lora,
    "ConvNeXt": zoo_models.timm_convnext,
    "convolutional VAE": zoo_models.convolutional_vae,
}
"""Models of kinds that shapes tell, of at least 95% of whose entries they do."""
MISLEADING = {
    "GPT-2, 2 layers, 1000 tokens": of("GPT2LMHeadModel", **SMALL),
    "CLIP, two towers": zoo_models.clip,
    "DiT": zoo_models.dit,
    "Mamba": zoo_models.mamba,
}
"""Models in which shapes mislead: embeddings without as many rows as a vocabulary has, several networks in one."""


@cache
def compare(name):
    """Return the number of a model's trainable entries, and pairs of rows that differ in rule or matrices."""
    model = (ALIKE | MISLEADING)[name]()
    seen = {id(row.param): row for row in steepest.route(model, "soap")}
    guessed = ByShape([p for p in model.parameters() if p.requires_grad], lr=1e-3).routing
    pairs = [(seen[id(row.param)], row) for row in guessed]
    assert len(pairs) == len(seen)
    differing = [(mine, other) for mine, other in pairs if (mine.rule, mine.view) != (other.rule, other.view)]
    return sum(row.param.numel() for row in guessed), differing


def share(entries, differing):
    return 1 - sum(mine.param.numel() for mine, _ in differing) / entries


def line(name, entries, differing):
    def said(mine, other):
        what = (mine.layout, other.layout) if mine.rule == other.rule else (mine.rule, other.rule)
        return f"`{mine.name}` {'×'.join(map(str, mine.shape))}: {what[0]}, not {what[1]}"

    shown = "; ".join(said(*pair) for pair in differing)
    return f"| {name} | {entries:,} | {100 * share(entries, differing):.1f}% | {shown or '-'} |"


@pytest.mark.parametrize("name", ALIKE)
def test_shapes_route_at_least_95_percent_of_entries_as_for_model_does(name):
    entries, differing = compare(name)
    print(line(name, entries, differing))
    assert share(entries, differing) >= 0.95


def test_the_differences_are_those_of_the_documentation():
    table = "\n".join(line(name, *compare(name)) for name in ALIKE | MISLEADING)
    print(table)
    documented = itertools.dropwhile(lambda text: not text.startswith("| model "), DOCS.read_text().splitlines())
    rows = itertools.takewhile(lambda text: text.startswith("|"), documented)
    assert list(rows)[2:] == table.splitlines()
