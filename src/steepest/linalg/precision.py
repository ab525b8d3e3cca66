"""How exactly float32 products are computed, as a scope; and TF32 for machines that don't have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRECISIONS = ("highest", "high", "medium")
"""torch's names: full float32; TF32 (10 mantissa bits); bfloat16 (7 bits), each where the device has it."""

ATEN = torch.ops.aten
FACTORS = {
    **dict.fromkeys((ATEN.mm, ATEN.bmm), (0, 1)),
    **dict.fromkeys((ATEN.addmm, ATEN.addmm_, ATEN.baddbmm, ATEN.baddbmm_, ATEN.addbmm, ATEN.addbmm_), (1, 2)),
}
"""The products that tensor cores compute, which ``@``, `torch.matmul`, `torch.einsum` and linear layers end in; and
which of their arguments are multiplied. A matrix times a vector and a dot product run on other units, in float32."""

_scope: str | None = None
"""The precision of the innermost `fp32_matmul_precision`; inside a graph, torch can't be asked."""


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
    global _scope
    if torch.compiler.is_compiling() and precision == _scope:  # else the graph breaks, and what follows is set
        yield
        return
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set the backends one by one: torch refuses to name one precision for all
        overall = None
    changes = overall != precision
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if changes else ()  # type: ignore[attr-defined]
    per_backend = [backend.fp32_precision for backend in backends]
    if changes:
        torch.set_float32_matmul_precision(precision)
    outer, _scope = _scope, precision
    try:
        yield
    finally:
        _scope = outer
        if changes and overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, value in zip(backends, per_backend, strict=True):
            backend.fp32_precision = value


def has_tf32(device: torch.device | str) -> bool:
    """Whether products on this device are really computed in TF32 at "high": NVIDIA GPUs from Ampere on.

    >>> has_tf32("cpu")
    False
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def round_to_tf32(x: Tensor) -> Tensor:
    """Float32 numbers ``x`` rounded to TF32's 10 mantissa bits, to nearest and ties to even; the exponent stays 8 bits.

    Infinities and NaN stay what they are. Other dtypes come back as they are, too.

    Example:
        >>> x = 1 + torch.tensor([2**-10, 2**-11, 3 * 2**-11, 2**-12])
        >>> (round_to_tf32(x) - 1) * 2**10
        tensor([1., 0., 2., 0.])
    """
    if x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    # Half a unit of the last bit that stays, less one below it where that bit is 0: of two at a tie, the even one.
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


@contextmanager
def tf32_emulated() -> Iterator[None]:
    """Compute float32 products as TF32 does where ``fp32_matmul_precision`` asks for less than "highest".

    For studies on machines without TF32, and never on in ordinary training: inside the ``with`` block the factors of
    matrix products pass through `round_to_tf32`, whenever the precision in force is one at which a GPU would use TF32.
    Products and sums are float32, as on tensor cores; decompositions are left alone, as they are there.

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
    """Sees every operation on its way to a kernel, and rounds what products multiply."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = FACTORS.get(func.overloadpacket)
        # The switch that TF32 itself obeys; torch sets it for "high" and "medium" alike.
        if factors is not None and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = tuple(round_to_tf32(arg) if i in factors else arg for i, arg in enumerate(args))
        return func(*args, **(kwargs or {}))
