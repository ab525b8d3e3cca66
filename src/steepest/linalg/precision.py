"""The precision of float32 products as a context manager, and an emulation of TF32 on machines without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRECISIONS = ("highest", "high", "medium")
"""torch's names for full float32, TF32 (10 mantissa bits) and bfloat16 (7 bits), where the device has them."""

ATEN = torch.ops.aten
FACTORS = {
    **dict.fromkeys((ATEN.mm, ATEN.bmm), (0, 1)),
    **dict.fromkeys((ATEN.addmm, ATEN.addmm_, ATEN.baddbmm, ATEN.baddbmm_, ATEN.addbmm, ATEN.addbmm_), (1, 2)),
}
"""The operations that tensor cores compute, with the indices of the arguments that are multiplied.

``@``, `torch.matmul`, `torch.einsum` and linear layers call them. Products of a matrix and a vector and dot products
run on other units, in float32."""

_scope: str | None = None
"""The precision of the innermost `fp32_matmul_precision`, since torch's setting cannot be read inside a graph."""


@contextmanager
def fp32_matmul_precision(precision: str = "highest") -> Iterator[None]:
    """Compute float32 products at ``precision`` inside a ``with`` block, and restore the previous setting.

    Args:
        precision: "highest" (float32), "high" (TF32 on GPUs that have it) or "medium" (bfloat16 where it exists). On
            CPUs without such units all three are the same.

    Raises:
        ValueError: if ``precision`` is another word.

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
    global _scope
    if torch.compiler.is_compiling() and precision == _scope:  # otherwise the graph breaks, and torch is set below
        yield
        return
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch names no overall precision if the backends were set one by one
        overall = None
    if overall == precision:
        outer, _scope = _scope, precision
        try:
            yield
        finally:
            _scope = outer
        return
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    per_backend = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision(precision)
    outer, _scope = _scope, precision
    try:
        yield
    finally:
        _scope = outer
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value in zip(backends, per_backend, strict=True):
            backend.fp32_precision = value


def has_tf32(device: torch.device | str) -> bool:
    """Return whether this device computes products in TF32 at the precision "high": NVIDIA GPUs from Ampere on.

    >>> has_tf32("cpu")
    False
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def round_to_tf32(x: Tensor) -> Tensor:
    """Round float32 numbers to TF32's 10 mantissa bits, to nearest with ties to even.

    Infinities, NaN and tensors of other dtypes are returned as they are.

    Example:
        >>> x = 1 + torch.tensor([2**-10, 2**-11, 3 * 2**-11, 2**-12])
        >>> (round_to_tf32(x) - 1) * 2**10
        tensor([1., 0., 2., 0.])
    """
    if x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    # Adds half a unit of the last bit kept, or one bit less than that where this bit is 0, so that ties go to even.
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


@contextmanager
def tf32_emulated() -> Iterator[None]:
    """Emulate TF32 inside a ``with`` block, for studies on machines without it; never used in ordinary training.

    The factors of float32 matrix products pass through `round_to_tf32` wherever the precision in force is one at which
    a GPU would use TF32. Products and sums are computed in float32, as on tensor cores. Decompositions are not
    affected, as on a GPU.

    Example:
        >>> x = torch.tensor([[1 + 2**-12]])
        >>> with tf32_emulated():
        ...     exact = x @ x
        ...     with fp32_matmul_precision("high"):
        ...         rounded = x @ x
        >>> exact.item() > 1, rounded.item() == 1
        (True, True)
    """
    with _RoundedFactors():  # type: ignore[no-untyped-call]
        yield


class _RoundedFactors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that rounds the factors of matrix products to TF32."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = FACTORS.get(func.overloadpacket)
        # TF32 obeys this setting on a GPU; torch makes it for "high" and "medium" alike.
        if factors is not None and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = tuple(round_to_tf32(arg) if i in factors else arg for i, arg in enumerate(args))
        return func(*args, **(kwargs or {}))
