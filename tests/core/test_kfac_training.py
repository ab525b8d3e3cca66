"""K-FAC in training loops as people write them."""

from __future__ import annotations

import copy

import pytest
import torch
from layered import batch, close, mlp, squares, train, weights
from torch.nn.functional import cross_entropy

import steepest


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_autocast():
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    opt, other = steepest.KFAC(model), steepest.KFAC(twin)
    x, y = batch(0, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = squares(model(x), y)
    loss.backward()
    squares(twin(x), y).backward()
    opt.step()
    other.step()
    for name in ("A", "B"):
        ours, theirs = opt.state[model[2].weight][name], other.state[twin[2].weight][name]
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_schedule_acts_on_clipped_steps():
    model = mlp()
    twin = copy.deepcopy(model)
    opt, other = steepest.KFAC(model, 1.0, kl_clip=1e-4), steepest.KFAC(twin, 1.0, kl_clip=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.25)
    before = weights(model)
    train(model, opt, range(1))
    train(twin, other, range(1))
    schedule.step()
    close(4 * (weights(model) - before), weights(twin) - before)


def test_it_learns_to_classify():
    model = mlp(torch.float32)
    opt = steepest.KFAC(model, fisher="sampled")
    x, _ = batch(0, 64, torch.float32)
    labels = x[:, :3].argmax(1)
    for _ in range(30):
        opt.zero_grad()
        logits = model(x)
        opt.sample(logits, "categorical")
        cross_entropy(logits, labels).backward()
        opt.step()
    assert cross_entropy(model(x), labels) < 0.3
