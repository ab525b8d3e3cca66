"""State that is kept in fewer bytes between steps.

A rule computes in float32. The engine restores its state before an update and stores it after, so no rule knows.

* Bases in bfloat16 take half the bytes. Entries of an orthonormal basis need 8 bits, since a basis is only a choice of
  coordinates: what is projected in comes back out through the same basis.
* A momentum in 8 bits, Muon's, Dion's or Lion's, has a scale for each block of 64 entries, of which an entry is a
  multiple: 1.06 bytes instead of 4.
* Adam's two moments in 8 bits have a scale for each block of 64 entries: a pair takes 2.1 bytes instead of 8. Second
  moments are kept by their logarithms, in 254 levels over 24 binades below the largest of their block. First moments
  are kept as ``exp_avg / sqrt(exp_avg_sq)``, which is what a step makes of them, in 127 levels of either sign. So the
  rounding error of an entry is a fraction of the largest step in its block, however much the gradients in the block
  differ. Blocks are those of Dettmers et al., arXiv:2110.02861, where both moments have a table of levels that was made
  for raw gradients.

An average moves by a few percent in a step, which is less than the width of a level. So rounding is stochastic: up or
down with the probabilities that make the mean exact, by a hash of the entry's position and of the number of the step,
as in `steepest.linalg.rounding`.

Blocks lie within rows. A parameter under an elementwise rule has any shape, and a row for each index of its first
dimension, between which FSDP2 cuts. Rows of one entry, which vectors have, would need a scale for each; their moments
stay in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from steepest.linalg.rounding import mixed
from steepest.rule import Elementwise, Rule, State

BLOCK = 64
"""Entries of a row that share a scale: 1/16 byte an entry, and a lone outlier coarsens no more than 63 others."""
BINADES = 24
"""From the largest second moment of a block to the least above zero: 2⁻¹² as a step's denominator. SOAP's noise floor
starts far above, at 2⁻⁷ of the whole matrix's."""
CODES = {"exp_avg_sq": torch.uint8, "exp_avg": torch.int8, "momentum_buffer": torch.int8}
"""Moments by name, with the dtype of their codes: squares are never negative. They come first, since ``exp_avg`` is
stored as a fraction of their roots."""
LEVELS = 254
PER_LEVEL = BINADES / LEVELS


@dataclass(frozen=True)
class Storage:
    """The formats of a stack's state; "float32" stands for the dtype that the rule computes in, whatever it is.

    Example:
        >>> state = {"exp_avg": torch.tensor([[[0.5, -1.0]]]), "exp_avg_sq": torch.tensor([[[1.0, 4.0]]])}
        >>> storage = Storage(moments="int8")
        >>> stored = storage.laid_out(state)
        >>> storage.store(state, stored, torch.ones(1, 1, 1))
        >>> stored["exp_avg"], stored["exp_avg_sq"]
        (tensor([[[ 126, -127]]], dtype=torch.int8), tensor([[[234, 255]]], dtype=torch.uint8))
        >>> storage.restored(stored)["exp_avg"]
        tensor([[[ 0.4988, -1.0000]]])
    """

    bases: str = "float32"
    moments: str = "float32"

    @staticmethod
    def of(rule: Rule | Elementwise) -> Storage | None:
        """Return what a rule's ``basis_dtype`` and ``moment_dtype`` ask for; None if state is kept as it is."""
        bases, moments = getattr(rule, "basis_dtype", "float32"), getattr(rule, "moment_dtype", "float32")
        return None if bases == moments == "float32" else Storage(bases, moments)

    def laid_out(self, state: State, first: int = 2) -> State:
        """Return stored state for fresh state: bases are converted, moments are zero.

        Rows of moments are what the dimensions from ``first`` on hold: 2 in a stack ``[B, m, n]``, 1 in a parameter.
        """
        stored: State = {}
        whole = max((x.shape for name, x in state.items() if name in CODES), key=math.prod, default=None)
        for name, x in state.items():
            row, in_full = math.prod(x.shape[first:]), x.shape == whole  # NorMuon's second moments are one a row
            if self._is_short(name):
                stored[name] = x.to(torch.bfloat16)
            elif self.moments != "float32" and name in CODES and in_full and row > 1:
                stored[name] = x.new_zeros(x.shape, dtype=CODES[name])
                stored[f"{name}_scale"] = x.new_zeros(*x.shape[:first], math.ceil(row / BLOCK))
            else:
                stored[name] = x
        return stored

    def restored(self, stored: State) -> State:
        """Return the state for a rule to read and change; tensors that are stored as they are come back themselves."""
        like = next(x for name, x in stored.items() if not self._is_short(name) and x.is_floating_point())
        state = {name: x.to(like.dtype) if self._is_short(name) else x for name, x in stored.items()}
        for name in _found(stored):
            state[name] = _decoded(name, stored)
            del state[f"{name}_scale"]
        if _is_fraction(stored):
            state["exp_avg"] *= state["exp_avg_sq"].sqrt()
        return state

    def store(self, state: State, stored: State, t: Tensor, position: Tensor | None = None) -> None:
        """Store the state that an update has changed.

        Args:
            state: the return value of `restored`, which has been changed since.
            stored: the target; tensors that are stored as they are have been changed in place.
            t: ``[B, 1, 1]``, the number of the update; of one element for a parameter.
            position: of each entry in the whole parameter, int64; a stack has all entries of its matrices.
        """
        for name in stored:
            if self._is_short(name):
                stored[name].copy_(state[name])
        found = _found(stored)
        if not found:
            return
        bits = _bits(_rows(found[0], stored).shape, t, position)
        for name in found:
            x = state[name]
            if name == "exp_avg" and _is_fraction(stored):
                root = _decoded("exp_avg_sq", stored).sqrt()
                x = torch.where(root > 0, x / root, 0)
            x = x.reshape(_rows(name, stored).shape)
            if CODES[name] == torch.uint8:
                codes, scales = coded_squares(x, (bits & 0xFFFF) / 2**16)
            else:
                codes, scales = coded(x, (bits >> 16) / 2**16)
            _rows(name, stored).copy_(codes)
            stored[f"{name}_scale"].copy_(scales)

    def _is_short(self, name: str) -> bool:
        return self.bases != "float32" and name.startswith("Q_")


def laid_out(rule: Rule | Elementwise, like: Tensor) -> State:
    """Return a rule's fresh state, as it is stored between steps.

    ``like`` is a stack ``[B, m, n]``, or a parameter if the rule is elementwise.
    """
    state, storage = rule.init(like), Storage.of(rule)
    return state if storage is None else storage.laid_out(state, first=2 if isinstance(rule, Rule) else 1)


def _found(stored: State) -> list[str]:
    """Return the names of the moments that are stored in 8 bits, second moments first."""
    return [name for name in CODES if f"{name}_scale" in stored]


def _is_fraction(stored: State) -> bool:
    """Return whether first moments are stored as a fraction of the roots of second ones; Lion has only first ones."""
    return {"exp_avg_scale", "exp_avg_sq_scale"} <= stored.keys()


def _rows(name: str, stored: State) -> Tensor:
    """Return the codes of moments as rows: a view with the dimensions of their scales."""
    return stored[name].flatten(stored[f"{name}_scale"].dim() - 1)


def _decoded(name: str, stored: State) -> Tensor:
    """Return the numbers that the codes of moments stand for, in the shape of the codes."""
    decode = decoded_squares if CODES[name] == torch.uint8 else decoded
    return decode(_rows(name, stored), stored[f"{name}_scale"]).view(stored[name].shape)


def coded(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Code ``x [..., n]`` by multiples of a scale for each block of a row.

    Args:
        x: finite numbers.
        noise: of x's shape, uniform in [0, 1).

    Returns:
        Codes from -127 to 127, and scales ``[..., n/64]``.
    """
    scales = _blocks(x.abs()).amax(dim=-1) / 127
    scale = _by_entry(scales, x.shape[-1])
    codes = torch.where(scale > 0, x / scale, 0).add(noise).floor().clamp(-127, 127)
    return codes.to(torch.int8), scales


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers that `coded` was given, to 1/127 of the largest of their block."""
    return codes * _by_entry(scales, codes.shape[-1])


def coded_squares(v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Code ``v [..., n]``, which is not negative, by logarithms below the largest of its block.

    What lies more than `BINADES` below the largest is coded as the least level, because zero would be a denominator.

    Args:
        v: finite numbers.
        noise: of v's shape, uniform in [0, 1).

    Returns:
        Codes, which are 0 for zero, and the largest of each block, ``[..., n/64]``.
    """
    scales = _blocks(v).amax(dim=-1)
    scale = _by_entry(scales, v.shape[-1])
    ratio = torch.where(scale > 0, v / scale, 0)
    level = (LEVELS + ratio.log2() / PER_LEVEL).floor().clamp(0, LEVELS - 1)  # off by one where log2 rounds
    level = level + (ratio >= _ratio(level + 1)).to(v.dtype) - (ratio < _ratio(level)).to(v.dtype)
    level = level.clamp(0, LEVELS - 1)
    below, above = _ratio(level), _ratio(level + 1)
    up = (ratio - below) / (above - below) > noise
    return torch.where(ratio > 0, level + up.to(v.dtype) + 1, 0).to(torch.uint8), scales


def decoded_squares(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the numbers that `coded_squares` was given, to one level, which is 7%."""
    ratios = _ratio((codes.to(scales.dtype) - 1).clamp(min=0))
    return torch.where(codes > 0, ratios * _by_entry(scales, codes.shape[-1]), 0)


def _ratio(level: Tensor) -> Tensor:
    """Return the ratio to the largest of a block that each level stands for; levels are integers up to `LEVELS`."""
    return _levels(level.dtype, level.device).index_select(0, level.flatten().int()).view(level.shape)


@cache
def _levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the ratios of all levels ``[LEVELS + 1]``: 24 binades, up to 1.

    A table is used because a formula would round differently where numbers don't fill a vector register, and then a
    matrix alone on its rank would differ from the same matrix in a stack.
    """
    exponents = torch.arange(-LEVELS, 1, dtype=torch.float64, device="cpu") * PER_LEVEL
    ratios = torch.exp2(exponents).to(dtype).tolist()
    pins = device.type == "cuda"  # else the copy would wait for the GPU
    table = torch.tensor(ratios, dtype=dtype, device="cpu", pin_memory=pins)
    return table.to(device, non_blocking=True)


def _blocks(x: Tensor) -> Tensor:
    """Return ``[..., n]`` as ``[..., ceil(n/64), 64]``, padded with zeros."""
    return pad(x, (0, -x.shape[-1] % BLOCK)).reshape(*x.shape[:-1], math.ceil(x.shape[-1] / BLOCK), BLOCK)


def _by_entry(scales: Tensor, n: int) -> Tensor:
    """Repeat the scale of each block for its entries, ``[..., n]``."""
    return scales.repeat_interleave(BLOCK, dim=-1)[..., :n]


def _bits(shape: torch.Size, t: Tensor, position: Tensor | None) -> Tensor:
    """Hash each entry's position in its matrix and ``t [B, 1, 1]`` to 32 bits for each entry, ``[B, m, n]``.

    A parameter has ``[m, n]`` and one t.
    """
    *_, m, n = shape
    if position is None:
        position = torch.arange(m * n, device=t.device)
    return mixed(position.view(m, n) ^ mixed(t.long()))
