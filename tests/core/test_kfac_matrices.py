"""The matrices that K-FAC sees: layers, groups of convolutions, blocks of fused projections, transposed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kfac_training import draw, net, of, same, train
from torch import Tensor, nn

import steepest


def test_the_groups_of_a_convolution_are_convolutions() -> None:
    whole = nn.Conv2d(4, 6, 3, groups=2).double()
    halves = nn.ModuleList([nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)]).double()
    for k, half in enumerate(halves):
        half.weight.data, half.bias.data = whole.weight.data[3 * k :][:3].clone(), whole.bias.data[3 * k :][:3].clone()
    optimizers = [steepest.KFAC(module, kl_clip=0.0, loss_terms=8) for module in (whole, halves)]
    for step in range(3):
        x = draw(8, 4, 5, 5, seed=step)
        whole(x).square().sum().backward()
        sum(half(x[:, 2 * k : 2 * k + 2]).square().sum() for k, half in enumerate(halves)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(of(whole), zip(*(of(half) for half in halves), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-11, atol=1e-12)


def test_a_fused_projection_may_be_split() -> None:
    """Diagonal blocks of B, and the inputs of all."""
    fused, parts = nn.Linear(4, 9).double(), nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 3)]).double()
    for part, rows in zip(parts, (slice(0, 6), slice(6, 9)), strict=True):
        part.weight.data, part.bias.data = fused.weight.data[rows].clone(), fused.bias.data[rows].clone()
    optimizers = [
        steepest.KFAC(fused, kl_clip=0.0, loss_terms=8, overrides={"weight": {"split": (6, 3)}}),
        steepest.KFAC(parts, kl_clip=0.0, loss_terms=8),
    ]
    for step in range(3):
        x = draw(8, 4, seed=step)
        fused(x).pow(4).sum().backward()
        sum(part(x).pow(4).sum() for part in parts).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(of(fused), zip(*(of(part) for part in parts), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="EKFAC takes a layer as one matrix"):
        steepest.EKFAC(fused, overrides={"weight": {"split": (6, 3)}})


class Conv1D(nn.Module):
    """A linear layer as that of Hugging Face's transformers, whose weight is stored as [inputs, outputs]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.nf = layer.out_features
        self.weight = nn.Parameter(layer.weight.detach().mT.contiguous())
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_weight_may_be_stored_the_other_way() -> None:
    layer = nn.Linear(4, 3).double()
    other = Conv1D(layer)
    for model in (layer, other):
        train(model, steepest.KFAC(model), range(3))
    torch.testing.assert_close(other.weight.mT, layer.weight, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(other.bias, layer.bias, rtol=1e-11, atol=1e-12)


def test_blocks_of_a_layer_have_blocks_of_its_factors() -> None:
    model = nn.Linear(4, 6).double()
    optimizer = steepest.KFAC(model, block_size=3)
    train(model, optimizer, range(3))
    state = optimizer.state[model.weight]
    shapes = [(tuple(state[f"B.{k}"].shape), tuple(state[f"A.{k}"].shape)) for k in range(4)]
    assert shapes == [((3, 3), (2, 2)), ((3, 3), (3, 3))] * 2  # the bias is in the second block of columns
    assert torch.equal(state["A.1"], state["A.3"])


def test_where_second_moments_start_anew_at_each_step_ekfac_is_kfac_in_its_basis() -> None:
    models = net(), net()
    options: dict[str, Any] = {"settle": 0, "statistics_frequency": 1, "precondition_frequency": 1}
    train(models[0], steepest.KFAC(models[0], form="eigen", **options), range(4))
    train(models[1], steepest.EKFAC(models[1], damping_form="relative", **options), range(4))
    assert same(of(models[0]), of(models[1]))
    train(models[1], steepest.EKFAC(models[1], **options | {"precondition_frequency": 3}), range(4))
    train(models[0], steepest.KFAC(models[0], form="eigen", **options | {"precondition_frequency": 3}), range(4))
    assert not same(of(models[0]), of(models[1]))
