import sys
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "core")]  # what test files share, by name: models of the zoo, too

if find_spec("torchvision"):
    # timm and others import torchvision, whose compiled operators fit one build of torch, that for CUDA perhaps. No test
    # needs them; but where they can't be loaded, importing it fails for want of the signatures of two.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
