"""The optimizers of other libraries, each set to do the work that ours in its family does.

They get our learning rate, decay, moments and frequency. The other settings stand here and in docs/benchmarks.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from steepest.engine.group import option_defaults
from steepest.lab.bench.entrants import Entrant, Family

PACKAGES = ("pytorch_optimizer", "heavyball")
"""The packages besides torch; the extra ``peers`` installs both."""
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library."""

    kind: str
    """The kind of the family that it belongs to."""
    package: str
    name: str
    settings: Callable[[Options], dict[str, Any]]
    """Its constructor's options, from those of ours."""
    note: str = ""
    """What tells it from another peer of the same name."""
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    grouped: bool = False
    """Whether it takes its parameters in a group with ``use_muon=True``."""

    def entrant(self, ours: Entrant) -> Entrant:
        """Return the peer of one of our entrants. Its library is imported when it is made."""
        settings = self.settings(option_defaults(ours.rule.name) | dict(ours.settings))

        def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            cls = getattr(import_module(self.package), self.name)
            made: torch.optim.Optimizer = cls(
                [{"params": params, "use_muon": True}] if self.grouped else params, **settings
            )
            return made

        label = f"{self.package}.{self.name}" + (f" {self.note}" if self.note else "")
        label += f" f{ours.family.frequency}" if ours.family.frequency else ""
        label += f" ({ours.family.max_precond_dim})" if ours.family.max_precond_dim else ""
        return Entrant(label, ours.family, ours.rule, make, settings, ours=False, scope=self.scope)


@contextmanager
def float32_for_bfloat16() -> Iterator[None]:
    """Let `Tensor.bfloat16` convert to float32 inside the ``with`` block, as torch.optim.Muon then multiplies."""
    to_bfloat16 = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = torch.Tensor.float  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = to_bfloat16  # type: ignore[method-assign]


@contextmanager
def heavyball_compiles(mode: str | None) -> Iterator[None]:
    """Set the mode in which heavyball compiles its functions inside the ``with`` block; None runs them uncompiled."""
    utils = import_module("heavyball").utils
    before, utils.compile_mode = utils.compile_mode, mode
    try:
        yield
    finally:
        utils.compile_mode = before


def _options(names: str, **more: Any) -> Callable[[Options], dict[str, Any]]:
    """Return a function that makes a peer's options: ours by name, ``theirs=ours`` where names differ, and values."""
    pairs = [word.partition("=") for word in names.split()]

    def settings(ours: Options) -> dict[str, Any]:
        found = {theirs: ours[name or theirs] for theirs, _, name in pairs}
        return found | {name: value(ours) if callable(value) else value for name, value in more.items()}

    return settings


EAGER = partial(heavyball_compiles, None)
AS_IT_COMES = partial(heavyball_compiles, "max-autotune-no-cudagraphs")

_ADAM = "lr betas eps weight_decay"
_SOAP = f"{_ADAM} shampoo_beta precondition_frequency"
adam = _options(_ADAM)
muon = _options("lr momentum weight_decay nesterov")
muon_by_betas = _options("lr weight_decay nesterov", betas=lambda o: (o["momentum"], 0.99))
adamuon = _options("lr weight_decay", betas=lambda o: (o["momentum"], o["momentum"]))
soap = _options(f"{_SOAP} max_precond_dim", merge_dims=False)
long_soap = _options(f"{_SOAP} max_precondition_dim=max_precond_dim", merge_dims=False)
shampoo = _options(
    "lr weight_decay preconditioning_compute_steps=precondition_frequency", momentum=lambda o: o["betas"][0]
)
PEERS = (
    Peer("adamw", "torch.optim", "AdamW", adam),
    Peer("adamw", "torch.optim", "AdamW", _options(_ADAM, fused=True), "fused"),
    Peer("adamw", "heavyball", "AdamW", adam, scope=EAGER),
    Peer("lion", "pytorch_optimizer", "Lion", _options("lr betas weight_decay")),
    Peer("muon", "torch.optim", "Muon", muon),
    Peer("muon", "torch.optim", "Muon", muon, "in float32", scope=float32_for_bfloat16),
    Peer("muon", "pytorch_optimizer", "Muon", muon, grouped=True),
    Peer("muon", "heavyball", "Muon", muon_by_betas, scope=EAGER),
    Peer("normuon", "pytorch_optimizer", "NorMuon", muon, grouped=True),
    Peer("adamuon", "pytorch_optimizer", "AdaMuon", adamuon, grouped=True),
    Peer("soap", "pytorch_optimizer", "SOAP", long_soap),
    Peer("soap", "heavyball", "SOAP", soap, scope=EAGER),
    Peer("kl-soap", "heavyball", "KLSOAP", soap, scope=EAGER),
    Peer("shampoo", "pytorch_optimizer", "Shampoo", shampoo),
    Peer("kl-shampoo", "heavyball", "KLShampoo", soap, scope=EAGER),
)
"""All peers, in the order in which they stand within a family."""


def peers_of(ours: Iterable[Entrant], libraries: bool, compiled: bool = False) -> tuple[list[Entrant], list[str]]:
    """Return the peers of every family, once each.

    Args:
        ours: our entrants, whose families are looked at.
        libraries: whether to include the peers from `PACKAGES`.
        compiled: whether to add heavyball's optimizers as they come, compiled.

    Returns:
        The peers, and the packages that are missing.
    """
    found: list[Entrant] = []
    missing: set[str] = set()
    families: dict[Family, Entrant] = {}
    for one in ours:
        families.setdefault(one.family, one)  # the first of a family gives its peers their settings
    for one in families.values():
        for peer in PEERS:
            if one.family.kind != peer.kind or (peer.package in PACKAGES and not libraries):
                continue
            if importlib.util.find_spec(peer.package) is None:
                missing.add(peer.package)
                continue
            found.append(peer.entrant(one))
            if compiled and peer.scope is EAGER:
                found.append(replace(peer, note="compiled", scope=AS_IT_COMES).entrant(one))
    return found, sorted(missing)
