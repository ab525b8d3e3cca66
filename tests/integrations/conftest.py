import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from steepest.engine.diagnostics.readings import Readings

HERE = Path(__file__).parent
# What test files share, by name: models of the zoo, and ranks, too.
sys.path[:0] = [str(HERE), str(HERE.parent / "core"), str(HERE.parent / "distributed")]

if find_spec("torchvision"):
    # timm and others import torchvision, whose compiled operators fit one build of torch, that for CUDA perhaps. No
    # test needs them; but where they can't be loaded, importing it fails for want of the signatures of two.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture
def readings(monkeypatch):
    """Count how often diagnostics are read from tensors."""
    counted = []
    read = Readings.read
    monkeypatch.setattr(Readings, "read", lambda self: counted.append(self) or read(self))
    return counted
