"""How exactly float32 products are computed, as a scope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("highest", "high", "medium")
"""torch's names: full float32; TF32 (10 mantissa bits); bfloat16 (7 bits), each where the device has it."""


@contextmanager
def fp32_matmul_precision(precision: str = "highest") -> Iterator[None]:
    """Compute float32 products at ``precision`` inside the ``with`` block, and restore what was set before.

    Args:
        precision: "highest" (float32), "high" (TF32 on GPUs that have it) or "medium" (bfloat16 where it exists). On
            CPUs without such units all three are the same.

    Raises:
        ValueError: if ``precision`` is none of the three.

    Example:
        >>> before = torch.get_float32_matmul_precision()
        >>> with fp32_matmul_precision("high"):
        ...     torch.get_float32_matmul_precision()
        'high'
        >>> torch.get_float32_matmul_precision() == before
        True
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(map(repr, PRECISIONS))}")
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    per_backend = [backend.fp32_precision for backend in backends]
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set the backends one by one: torch refuses to name one precision for all
        overall = None
    if overall == precision:
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value in zip(backends, per_backend, strict=True):
            backend.fp32_precision = value
