"""The polar factor ``U Vᵀ`` of ``G = U Σ Vᵀ``, the nearest matrix whose singular values are all one.

Newton-Schulz iterations compute it by products alone. A step ``X ← (a I + b X Xᵀ + c (X Xᵀ)²) X`` keeps the singular
vectors and maps every singular value σ to ``a σ + b σ³ + c σ⁵``; a table of such polynomials, one per step, raises all
of (0, 1] towards 1. Most tables are made for Muon, which needs small singular values raised fast and tolerates results
between about 0.7 and 1.3. The numbers of a table never change: better numbers get a new name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from steepest.linalg.attempts import attempt
from steepest.linalg.precision import fp32_matmul_precision
from steepest.linalg.symmetric import gram, plus_product, symmetric_product

Polynomial = tuple[float, float, float]
"""The coefficients ``(a, b, c)`` of σ ↦ a σ + b σ³ + c σ⁵."""

GRAM_ASPECT = 2
"""The ratio of sides from which the iteration runs on the smaller Gram matrix. With short side s and long side l, five
quintic steps cost 20 s²l + 10 s³ FLOPs, in Gram form 4 s²l + 34 s³, which is equal at l = 1.5 s. On one CPU thread, for
s = 256 and 768, the Gram form takes 1.3 of the time at l = s, 0.85 at 2 s, 0.67 at 3 s, 0.56 at 4 s."""

GRAM_STEPS = 5
"""The number of steps before the Gram matrix is computed again. Its zero eigenvalues are rounding errors, which every
step multiplies by a²; when a negative one comes near -1 the iteration diverges, as it does in ten steps. After five
steps the tables' results are within 4e-3 of float64's, at condition numbers up to 1e12."""

HALF_ASPECT, HALF_FIRST, HALF_STEPS = 3, 2, 3
"""In float16: the ratio of sides from which the iteration runs on the Gram matrix, and after how many steps that is
computed again, at first and then. Without that the errors of small singular values reach 1 to 13 in five steps; with
it they stay below 0.06, a quarter or less of bfloat16's (`python benchmarks/polar.py`). Five steps
cost 8 s²l + 28 s³ FLOPs, at l = 3 s three quarters of the plain form's, at 4 s two thirds, at 16 s half."""

HARMLESS = 1e-12
"""The eps from which on a matrix, divided by it, has a norm below one where the squares of all entries underflow."""

BFLOAT16_ROWS, BFLOAT16_ASPECT = 128, 4
"""The least short side and the largest ratio of sides at which bfloat16 is faster on a CPU with units for it."""


@dataclass(frozen=True)
class Table:
    """A sequence of Newton-Schulz polynomials with its source and its conditions of use."""

    source: str
    steps: Sequence[Polynomial]
    safety: float = 1.0
    """The factor of the Frobenius norm by which G is divided: a margin for rounding if polynomials diverge above 1."""
    half: bool = True
    """Whether the iteration survives the rounding of bfloat16 and float16."""


JORDAN = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: Sequence[Polynomial] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)

TABLES = {
    "keller": Table(
        source="K. Jordan, https://kellerjordan.github.io/posts/muon (2024)",
        steps=(JORDAN,) * 5,
    ),
    "quintic_you": Table(
        source="J. You, in https://github.com/KellerJordan/modded-nanogpt (2025)",
        steps=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
    ),
    "polar_express_5": Table(
        source="Amsel et al., arXiv:2505.16932, Algorithm 1, the first five steps",
        # The paper's numbers are for σ from 1e-3 on; every polynomial is scaled so that σ up to 1.01 is in its domain.
        steps=tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS),
        safety=1.01,
    ),
    "polar_express_dion": Table(
        source="Amsel et al.'s method for five steps with cushion 2, in https://github.com/microsoft/dion (2025)",
        steps=(
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        safety=1.02,
    ),
    "cans": Table(
        source="Grishina et al., Chebyshev-optimized Newton-Schulz, arXiv:2506.10935",
        steps=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        half=False,  # its polynomials leave no margin at 1: matrices near rank one end at 1e17
    ),
    "cubic5": Table(
        source="H. Huang, How much orthogonalization does Muon need?, arXiv:2606.00371",
        steps=(
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
    ),
    "deepseekv4": Table(
        source="DeepSeek-V4 technical report (2026): eight steps that approach 1, two that converge",
        steps=(JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    ),
}

METHODS = (*TABLES, "exact")
"""The methods of `polar_factor`: the names of the tables, and "exact" for singular value decomposition."""


def polar_factor(
    G: Tensor, method: str = "keller", *, eps: float = 1e-7, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    """Return the polar factor of each matrix of a batch, or its approximation by a Newton-Schulz table.

    Args:
        G: ``[..., m, n]``. A zero matrix gives zero; without eps, in float32, one of norm below 1e-18, too.
        method: the name of a table in `TABLES`, or "exact" for singular value decomposition, which is slow and meant
            for tests. With "exact", singular values below rounding give zero, not an arbitrary direction.
        eps: a number added to the Frobenius norm by which G is divided, in the gradient's units: matrices of a smaller
            norm give proportionally less than their polar factor. Not used by "exact".
        dtype: the dtype of the iteration; by default `working_dtype`.
        scale: a factor of the result, which costs a table nothing: the last polynomial takes it in.

    Returns:
        ``[..., m, n]`` in G's dtype. With "exact", NaN for a matrix that no solver can decompose.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, -0.1]]), "exact")
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, METHODS))}")
    if method == "exact":
        return attempt(_by_svd, G) * scale
    table = TABLES[method]
    X = G.reshape(-1, *G.shape[-2:])  # [N, m, n]
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)  # [N, 1, 1]
    norm = norm if table.safety == 1 else table.safety * norm
    if eps < HARMLESS:  # or else the norm of a tiny matrix, which underflows, is nothing to divide by
        norm = torch.threshold(norm, negligible_norm(X.dtype), torch.inf)
    norm = norm + eps
    *others, last = table.steps
    a, b, c = (scale * coefficient for coefficient in last)
    X = torch.div(X, norm, out=torch.empty_like(X, dtype=dtype or working_dtype(G, table)))
    with fp32_matmul_precision("highest"):
        X = _iterate(X, (*others, (a, b, c)))
    return X.to(G.dtype).reshape(G.shape)


def negligible_norm(dtype: torch.dtype) -> float:
    """Return the Frobenius norm below which squares underflow, so that one cannot divide by it: 1e-18 in float32."""
    return 10 * math.sqrt(torch.finfo(dtype).tiny)


def iteration_dtype(G: Tensor, word: str) -> torch.dtype | None:
    """Return the dtype that "float32", "bfloat16", "float16" or "auto" means for ``G [..., m, n]``.

    None is `working_dtype`. float64 stays float64. On a CPU, "bfloat16" means float32 for matrices with fewer than
    `BFLOAT16_ROWS` on the short side, and for matrices so far from square that float32's Gram form is as fast.
    """
    short, long = sorted(G.shape[-2:])
    if word == "auto" or G.dtype == torch.float64:
        return None
    if word == "float16":
        return torch.float16
    if word == "float32" or (G.device.type == "cpu" and (short < BFLOAT16_ROWS or long > BFLOAT16_ASPECT * short)):
        return torch.float32
    return torch.bfloat16


def working_dtype(G: Tensor, table: Table) -> torch.dtype:
    """What to iterate in: float64 for float64, float16 on GPUs with units for it if the table allows, else float32.

    Singular values are at most 1 and polynomials at most 10, so float16's range suffices, and its rounding is an eighth
    of bfloat16's at the same speed. A CPU without units for either multiplies them at 1 GFLOP/s, 60 times slower than
    float32. The kind of device decides and no stopwatch, so that calls can be repeated bit by bit. The meta device, on
    which FLOPs are counted, stands for such a GPU.
    """
    if G.dtype == torch.float64:
        return torch.float64
    return torch.float16 if table.half and (G.is_meta or multiplies_float16(G.device)) else torch.float32


def multiplies_float16(device: torch.device) -> bool:
    """Return whether a device has units for products in float16: GPUs of compute capability 7.0 and up.

    >>> multiplies_float16(torch.device("cpu"))
    False
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def _by_svd(G: Tensor) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)  # [..., m, k], [..., k], [..., k, n]
    rounding = max(G.shape[-2:]) * torch.finfo(G.dtype).eps * sigma.amax(dim=-1, keepdim=True)
    polar: Tensor = (U * (sigma > rounding).unsqueeze(-2)) @ Vh
    return polar


def _iterate(X: Tensor, steps: Sequence[Polynomial]) -> Tensor:
    """``X [N, m, n]``, or one matrix, after all ``steps``, by products on its shorter side."""
    if len(X) == 1 and X.dim() == 3 and X.dtype.itemsize == 2:  # torch's batched products of one matrix are slower
        return _iterate(X[0], steps).unsqueeze(0)
    short, long = sorted(X.shape[-2:])
    if X.dtype != torch.bfloat16 and long >= short * (HALF_ASPECT if X.dtype == torch.float16 else GRAM_ASPECT):
        return _iterate_gram(X, steps)
    tall = X.shape[-2] > X.shape[-1]
    for a, b, c in steps:
        Z = _polynomial(_gram(X), b, c)  # [..., s, s]
        # With a on the diagonal of the polynomial, 16 bits would round it there, in bfloat16 at 2.5 times the error.
        X = plus_product(X, *((X, Z) if tall else (Z, X)), beta=a)  # [..., m, n]
    return X


def _iterate_gram(X: Tensor, steps: Sequence[Polynomial]) -> Tensor:
    """`_iterate` by the Gram matrix A: a step maps X to ``P X`` and A to ``P A P``, with ``P = a I + Z``."""
    half = X.dtype == torch.float16
    starts = [0, *range(HALF_FIRST if half else GRAM_STEPS, len(steps), HALF_STEPS if half else GRAM_STEPS)]
    for start, stop in pairwise([*starts, len(steps)]):
        (a, b, c), *others = steps[start:stop]
        A = _gram(X)  # [..., s, s]
        P = product = _polynomial(A, b, c)  # [..., s, s]
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        if others:
            A = symmetric_product(P @ A, P)
        for k, (a, b, c) in enumerate(others, start + 2):
            Z = _polynomial(A, b, c)
            product = symmetric_product(Z, product, product, beta=a)
            if k < stop:
                PA = plus_product(A, Z, A, beta=a)
                A = symmetric_product(PA, Z, PA, beta=a)
        X = X @ product.mT if X.shape[-2] > X.shape[-1] else product @ X
    return X


def _gram(X: Tensor) -> Tensor:
    """The smaller Gram matrix: ``X Xᵀ``, or ``Xᵀ X`` if X is tall."""
    return gram(X.mT if X.shape[-2] > X.shape[-1] else X)


def _polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """``Z = b A + c A²`` for ``A [..., s, s]``."""
    return symmetric_product(A, A, A, beta=b, alpha=c) if c else b * A
