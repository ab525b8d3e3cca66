"""The precision in which kernels compute products, and whether Triton's interpreter runs them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from steepest.linalg.untraced import untraced

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton interprets kernels, on the CPU and by NumPy. Triton reads this variable when a kernel is defined."""


@untraced  # torch's setting is no constant of the traced code
def product_precision(X: Tensor) -> str:
    """Return the precision in which products of X are computed: "bfloat16", "tf32" or "float32", as in `Gates`.

    float16 counts as "bfloat16", since sizes and speeds are the same.

    >>> product_precision(torch.zeros(1, dtype=torch.bfloat16))
    'bfloat16'
    """
    if X.dtype in (torch.bfloat16, torch.float16):
        return "bfloat16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
