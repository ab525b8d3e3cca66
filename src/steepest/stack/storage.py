"""How state is kept between steps: as it is, or in fewer bytes, by the same rules.

A rule computes in float32. The engine restores its state before an update and stores it after, so no rule knows.

* Bases in bfloat16: half the bytes. Entries of an orthonormal basis need 8 bits, since a basis is only a choice of
  coordinates: what is projected in comes back out through the same one.
* Adam's two moments in 8 bits, in blocks of 64 with a scale each: 2.1 bytes for a pair, not 8. Second moments are kept
  by their logarithms, 254 levels over 24 binades below the largest of their block. First moments are kept as
  ``exp_avg / sqrt(exp_avg_sq)``, which is what becomes of them in a step, in 127 levels of either sign: so an entry's
  rounding is a share of the largest step in its block, however unlike the gradients in it are. Blocks are those of
  Dettmers et al., arXiv:2110.02861; there both moments have a table of levels, made for raw gradients.

An average moves by a few percent in a step, less than a level is wide. So rounding is stochastic: up or down with the
odds that make the mean exact, by a hash of the entry's place and the number of the step, as in
`steepest.linalg.rounding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from steepest.linalg.rounding import mixed
from steepest.rule import Rule, State

BLOCK = 64
"""Entries of a row that share a scale: 1/16 byte an entry, and a lone outlier coarsens no more than 63 others."""
BINADES = 24
"""From the largest second moment of a block to the least above zero: 2⁻¹² as a step's denominator. SOAP's noise floor,
2⁻⁷ of the whole matrix's, lies far above."""
LEVELS = 254
PER_LEVEL = BINADES / LEVELS


@dataclass(frozen=True)
class Storage:
    """What a stack's state is kept in; "float32" stands for the dtype that the rule computes in, whatever it is.

    Example:
        >>> state = {"exp_avg": torch.tensor([[[0.5, -1.0]]]), "exp_avg_sq": torch.tensor([[[1.0, 4.0]]])}
        >>> storage = Storage(moments="int8")
        >>> kept = storage.laid_out(state)
        >>> storage.store(state, kept, torch.ones(1, 1, 1))
        >>> kept["exp_avg"], kept["exp_avg_sq"]
        (tensor([[[ 126, -127]]], dtype=torch.int8), tensor([[[234, 255]]], dtype=torch.uint8))
        >>> storage.restored(kept)["exp_avg"]
        tensor([[[ 0.4988, -1.0000]]])
    """

    bases: str = "float32"
    moments: str = "float32"

    @staticmethod
    def of(rule: Rule) -> Storage:
        """What a rule's options say: ``basis_dtype`` and ``moment_dtype``, where it has them."""
        return Storage(getattr(rule, "basis_dtype", "float32"), getattr(rule, "moment_dtype", "float32"))

    def laid_out(self, state: State) -> State:
        """Where the state of a stack, as a rule's ``init`` makes it, is kept: bases converted, moments at zero."""
        kept: State = {}
        for name, x in state.items():
            if self._is_short(name):
                kept[name] = x.to(torch.bfloat16)
            elif self._is_coded(name):
                kept[name] = x.new_zeros(x.shape, dtype=torch.int8 if name == "exp_avg" else torch.uint8)
                kept[f"{name}_scale"] = x.new_zeros(*x.shape[:-1], math.ceil(x.shape[-1] / BLOCK))
            else:
                kept[name] = x
        return kept

    def restored(self, kept: State) -> State:
        """State for a rule to read and change: the very tensors, where they are kept as they are."""
        if self == PLAIN:
            return kept
        like = next(x for name, x in kept.items() if not self._is_short(name) and not self._is_coded(name))
        state = {name: x.to(like.dtype) if self._is_short(name) else x for name, x in kept.items()}
        if self.moments != "float32":
            scales = state.pop("exp_avg_scale"), state.pop("exp_avg_sq_scale")
            v = decoded_squares(kept["exp_avg_sq"], scales[1])
            state["exp_avg_sq"] = v
            state["exp_avg"] = decoded(kept["exp_avg"], scales[0]) * v.sqrt()
        return state

    def store(self, state: State, kept: State, t: Tensor) -> None:
        """Keep what an update has changed.

        Args:
            state: what `restored` gave, changed since.
            kept: where to; what is kept as it is has been changed in place.
            t: ``[B, 1, 1]``, the number of the update.
        """
        for name in kept:
            if self._is_short(name):
                kept[name].copy_(state[name])
        if self.moments != "float32":
            m, v = state["exp_avg"], state["exp_avg_sq"]
            bits = _bits(v.shape, t)
            codes, scales = coded_squares(v, (bits & 0xFFFF) / 2**16)
            root = decoded_squares(codes, scales).sqrt()
            kept["exp_avg_sq"].copy_(codes)
            kept["exp_avg_sq_scale"].copy_(scales)
            codes, scales = coded(torch.where(root > 0, m / root, 0), (bits >> 16) / 2**16)
            kept["exp_avg"].copy_(codes)
            kept["exp_avg_scale"].copy_(scales)

    def _is_short(self, name: str) -> bool:
        return self.bases != "float32" and name.startswith("Q_")

    def _is_coded(self, name: str) -> bool:
        return self.moments != "float32" and name in ("exp_avg", "exp_avg_sq")


PLAIN = Storage()


def laid_out(rule: Rule, like: Tensor) -> State:
    """A rule's fresh state for a stack like ``like [B, m, n]``, as it is kept between steps."""
    return Storage.of(rule).laid_out(rule.init(like))


def coded(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., n]`` as multiples of a scale for each block of a row: codes in -127 to 127, and scales ``[..., n/64]``.

    Args:
        x: finite numbers.
        noise: of x's shape, uniform in [0, 1).
    """
    scales = _blocks(x.abs()).amax(dim=-1) / 127
    spread = _spread(scales, x.shape[-1])
    codes = torch.where(spread > 0, x / spread, 0).add(noise).floor().clamp(-127, 127)
    return codes.to(torch.int8), scales


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """What `coded` was given, to 1/127 of its block's largest."""
    return codes * _spread(scales, codes.shape[-1])


def coded_squares(v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``v [..., n]``, not negative, by logarithms below its block's largest: codes, 0 for zero, and these largest.

    What lies more than `BINADES` below counts as that; zero would be a denominator.
    """
    scales = _blocks(v).amax(dim=-1)
    spread = _spread(scales, v.shape[-1])
    share = torch.where(spread > 0, v / spread, 0)
    level = (LEVELS + share.log2() / PER_LEVEL).floor().clamp(0, LEVELS - 1)  # off by one where log2 rounds
    level = level + (share >= _share(level + 1)).to(v.dtype) - (share < _share(level)).to(v.dtype)
    level = level.clamp(0, LEVELS - 1)
    below, above = _share(level), _share(level + 1)
    up = (share - below) / (above - below) > noise
    return torch.where(share > 0, level + up.to(v.dtype) + 1, 0).to(torch.uint8), scales


def decoded_squares(codes: Tensor, scales: Tensor) -> Tensor:
    """What `coded_squares` was given, to a level, 7%."""
    shares = _share((codes.to(scales.dtype) - 1).clamp(min=0))
    return torch.where(codes > 0, shares * _spread(scales, codes.shape[-1]), 0)


def _share(level: Tensor) -> Tensor:
    """What levels, whole numbers from 0 to `LEVELS`, stand for as shares of a block's largest."""
    return _levels(level.dtype, level.device).index_select(0, level.flatten().int()).view(level.shape)


@cache
def _levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[LEVELS + 1]``: 24 binades, up to 1.

    A table and not a formula: torch's functions round otherwise where numbers don't fill a vector register, and then
    a matrix alone on its rank would not be what it is in a stack.
    """
    exponents = torch.arange(-LEVELS, 1, dtype=torch.float64) * PER_LEVEL
    return torch.exp2(exponents).to(dtype).to(device)


def _blocks(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[..., ceil(n/64), 64]``, filled up with zeros."""
    return pad(x, (0, -x.shape[-1] % BLOCK)).reshape(*x.shape[:-1], -1, BLOCK)


def _spread(scales: Tensor, n: int) -> Tensor:
    """Each entry's own scale, ``[..., n]``."""
    return scales.repeat_interleave(BLOCK, dim=-1)[..., :n]


def _bits(shape: torch.Size, t: Tensor) -> Tensor:
    """32 bits for each entry ``[B, m, n]``: a hash of where it lies in its matrix, and of ``t [B, 1, 1]``."""
    _, m, n = shape
    place = torch.arange(m * n, device=t.device).view(1, m, n)
    return mixed(place ^ mixed(t.long()))
