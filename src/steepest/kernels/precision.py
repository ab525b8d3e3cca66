"""What kernels compute in, and whether Triton's interpreter runs them."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable, it imports no compiler until there is one

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Triton reads the same when a kernel is defined. Its interpreter runs kernels on the CPU, entry by entry in NumPy."""


@_disable_dynamo  # torch's switch is no constant of the traced code
def product_precision(X: Tensor) -> str:
    """What products of X are computed in, in the words of `Gates`: "bfloat16", "tf32" or "float32".

    >>> product_precision(torch.zeros(1, dtype=torch.bfloat16))
    'bfloat16'
    """
    if X.dtype == torch.bfloat16:
        return "bfloat16"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
