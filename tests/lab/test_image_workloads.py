"""Workloads on handwritten digits, corrupted or noisy: perceptron, vision transformer, diffusion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from short_training import loss_after
from torch.nn import functional as F

from steepest.lab.shared.contenders import hidden_matrices
from steepest.lab.workloads import images
from steepest.lab.workloads.diffusion import noisy
from steepest.lab.workloads.workload import load_workload


def test_corrupted_images_are_shifted_by_up_to_a_pixel(monkeypatch) -> None:
    monkeypatch.setattr(images, "NOISE", 0.0)
    digits, _ = images.handwritten()
    shifted = images.corrupt(digits[:1].expand(200, 8, 8), torch.Generator().manual_seed(0))
    padded = F.pad(digits[0], (1, 1, 1, 1), value=-1.0)
    possible = [padded[i : i + 8, j : j + 8] for i, j in itertools.product(range(3), repeat=2)]
    seen = [sum(torch.equal(image, other) for image in shifted) for other in possible]
    assert sum(seen) == 200
    assert min(seen) > 5


def test_corrupted_images_have_noise() -> None:
    blank = torch.full((500, 8, 8), -1.0)
    noise = images.corrupt(blank, torch.Generator().manual_seed(0)) + 1
    assert noise.std().item() == pytest.approx(images.NOISE, rel=0.02)
    assert abs(noise.mean().item()) < 0.01


@pytest.mark.parametrize("name", ["mlp", "diffusion"])
def test_held_out_images_are_never_trained_on(name) -> None:
    workload = load_workload(name)
    data = workload.inputs if name == "mlp" else workload.images
    data[: workload.held_out] = math.nan
    generator = torch.Generator().manual_seed(0)
    batches = [workload.batch(generator)[0] for _ in range(20)]
    assert all(batch.isfinite().all() for batch in batches)
    data[workload.held_out] = math.nan  # the first that is trained on
    assert not all(workload.batch(generator)[0].isfinite().all() for _ in range(100))


def test_patches_see_each_other(loaded) -> None:
    torch.manual_seed(0)
    model = loaded("vit").model()
    pixels = torch.randn(1, 16, 32)
    changed = pixels.clone()
    changed[0, 15] += 1
    assert not torch.allclose(model.blocks(pixels)[0, 0], model.blocks(changed)[0, 0])


def test_patches_are_squares(loaded) -> None:
    """Of an image that is dark but for its upper left 2 × 2 pixels, only the first patch differs from the others."""
    torch.manual_seed(0)
    model = loaded("vit").model()
    image = torch.zeros(1, 8, 8)
    image[0, :2, :2] = 1
    seen = []
    model.patches.register_forward_hook(lambda module, inputs, outputs: seen.append(inputs[0]))
    model(image)
    assert torch.equal(seen[0][0, 0], torch.ones(4))
    assert torch.equal(seen[0][0, 1:], torch.zeros(15, 4))


def test_noise_replaces_the_image_with_time() -> None:
    image = torch.rand(3, 1, 8, 8)
    mixed, times, noise = noisy(image, torch.tensor([0.0, 0.5, 1.0]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed[0], image[0])
    torch.testing.assert_close(mixed[1], (image[1] + noise[1]) / math.sqrt(2))
    torch.testing.assert_close(mixed[2], noise[2])
    assert noise.std().item() == pytest.approx(1, abs=0.2)
    assert times.tolist() == [0.0, 0.5, 1.0]


def test_the_denoiser_knows_the_time(loaded) -> None:
    torch.manual_seed(0)
    model, image = loaded("diffusion").model(), torch.randn(1, 1, 8, 8)
    early, late = (model(image, torch.tensor([time])) for time in (0.1, 0.9))
    assert early.shape == image.shape
    assert (early - late).abs().max() > 1e-3
    early.sum().backward()
    assert model.time.weight.grad.abs().amax(dim=1).min() > 0  # it moves all channels of both resolutions
    assert "leave.weight" not in hidden_matrices(model)


@pytest.mark.parametrize(("name", "share"), [("mlp", 0.6), ("vit", 0.98), ("diffusion", 0.7)])
@pytest.mark.parametrize("contender", ["soap-f5", pytest.param("adamw", marks=pytest.mark.slow)])
def test_some_is_learned(loaded, name, share, contender) -> None:
    before, after = loss_after(loaded(name), 25, contender)
    assert after < share * before
