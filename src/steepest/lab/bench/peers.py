"""Other libraries' optimizers, each told to do the work that ours in its family does.

They get ours' learning rate, decay, moments and frequency. What else is set stands here and in docs/benchmarks.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch

from steepest.engine.group import option_defaults
from steepest.lab.bench.entrants import Entrant, Family

PACKAGES = ("pytorch_optimizer", "heavyball")
"""What isn't torch's; the extra ``peers`` installs both."""
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library."""

    kinds: Sequence[str]
    """Of families that it belongs to."""
    package: str
    name: str
    settings: Callable[[Options], dict[str, Any]]
    """Its constructor's, from those of ours."""
    note: str = ""
    """Behind its name, where it runs in several ways."""
    scope: Callable[[], AbstractContextManager[object]] = nullcontext
    grouped: bool = False
    """Whether it wants its parameters in a group that says ``use_muon``."""

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.package}.{self.name}" + (f" {self.note}" if self.note else "")

    def entrant(self, ours: Entrant) -> Entrant:
        """The peer of one of ours; the library is imported when it is made."""
        settings = self.settings(option_defaults(ours.rule.name) | dict(ours.settings))

        def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            cls = getattr(import_module(self.package), self.name)
            made: torch.optim.Optimizer = cls(
                [{"params": params, "use_muon": True}] if self.grouped else params, **settings
            )
            return made

        family = ours.family
        label = self.label + (f" f{family.frequency}" if family.frequency else "")
        label += f" ({family.max_precond_dim})" if family.max_precond_dim else ""
        return Entrant(label, ours.family, ours.rule, make, settings, ours=False, scope=self.scope)


@contextmanager
def float32_for_bfloat16() -> Iterator[None]:
    """`Tensor.bfloat16` converts to float32: so torch.optim.Muon multiplies in float32."""
    to_bfloat16 = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = torch.Tensor.float  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = to_bfloat16  # type: ignore[method-assign]


@contextmanager
def heavyball_compiles(mode: str | None) -> Iterator[None]:
    """heavyball's switch for torch.compile, read at every call of its functions; None runs them as they are."""
    utils = import_module("heavyball").utils
    before, utils.compile_mode = utils.compile_mode, mode
    try:
        yield
    finally:
        utils.compile_mode = before


def _adam(o: Options) -> dict[str, Any]:
    return {"lr": o["lr"], "betas": o["betas"], "eps": o["eps"], "weight_decay": o["weight_decay"]}


def _lion(o: Options) -> dict[str, Any]:
    return {name: o[name] for name in ("lr", "betas", "weight_decay")}


def _muon(o: Options) -> dict[str, Any]:
    return {name: o[name] for name in ("lr", "momentum", "weight_decay")}


def _nesterov_muon(o: Options) -> dict[str, Any]:
    return _muon(o) | {"nesterov": o["nesterov"]}


def _adamuon(o: Options) -> dict[str, Any]:
    return {"lr": o["lr"], "betas": (o["momentum"], o["momentum"]), "weight_decay": o["weight_decay"]}


def _heavyball_muon(o: Options) -> dict[str, Any]:
    settings = _nesterov_muon(o)
    return settings | {"betas": (settings.pop("momentum"), 0.99)}


def _soap(o: Options) -> dict[str, Any]:
    every = {"shampoo_beta": o["shampoo_beta"], "precondition_frequency": o["precondition_frequency"]}
    return _adam(o) | every | {"merge_dims": False}


def _pytorch_optimizer_soap(o: Options) -> dict[str, Any]:
    return _soap(o) | {"max_precondition_dim": o["max_precond_dim"]}


def _heavyball_soap(o: Options) -> dict[str, Any]:
    return _soap(o) | {"max_precond_dim": o["max_precond_dim"]}


def _pytorch_optimizer_shampoo(o: Options) -> dict[str, Any]:
    every = {"preconditioning_compute_steps": o["precondition_frequency"]}
    return {"lr": o["lr"], "momentum": o["betas"][0], "weight_decay": o["weight_decay"]} | every


EAGER = partial(heavyball_compiles, None)
AS_IT_COMES = partial(heavyball_compiles, "max-autotune-no-cudagraphs")
PEERS = (
    Peer(("adamw",), "torch.optim", "AdamW", _adam),
    Peer(("adamw",), "torch.optim", "AdamW", lambda o: _adam(o) | {"fused": True}, "fused"),
    Peer(("adamw",), "heavyball", "AdamW", _adam, scope=EAGER),
    Peer(("lion",), "pytorch_optimizer", "Lion", _lion),
    Peer(("muon",), "torch.optim", "Muon", _nesterov_muon),
    Peer(("muon",), "torch.optim", "Muon", _nesterov_muon, "in float32", scope=float32_for_bfloat16),
    Peer(("muon",), "pytorch_optimizer", "Muon", _nesterov_muon, grouped=True),
    Peer(("muon",), "heavyball", "Muon", _heavyball_muon, scope=EAGER),
    Peer(("normuon",), "pytorch_optimizer", "NorMuon", _nesterov_muon, grouped=True),
    Peer(("adamuon",), "pytorch_optimizer", "AdaMuon", _adamuon, grouped=True),
    Peer(("soap",), "pytorch_optimizer", "SOAP", _pytorch_optimizer_soap),
    Peer(("soap",), "heavyball", "SOAP", _heavyball_soap, scope=EAGER),
    Peer(("kl-soap",), "heavyball", "KLSOAP", _heavyball_soap, scope=EAGER),
    Peer(("shampoo",), "pytorch_optimizer", "Shampoo", _pytorch_optimizer_shampoo),
    Peer(("kl-shampoo",), "heavyball", "KLShampoo", _heavyball_soap, scope=EAGER),
)
"""Everybody; those of one family in this order."""


def peers_of(ours: Iterable[Entrant], libraries: bool, compiled: bool = False) -> tuple[list[Entrant], list[str]]:
    """Peers of every family once.

    Args:
        ours: whose families.
        libraries: others' than torch, too.
        compiled: heavyball's also as it comes, compiled.

    Returns:
        The peers, and the packages of which some are missing since they aren't installed.
    """
    found: list[Entrant] = []
    missing: set[str] = set()
    families: dict[Family, Entrant] = {}
    for one in ours:
        families.setdefault(one.family, one)  # whose settings the peers get
    for one in families.values():
        for peer in PEERS:
            if one.family.kind not in peer.kinds or (peer.package in PACKAGES and not libraries):
                continue
            if importlib.util.find_spec(peer.package) is None:
                missing.add(peer.package)
                continue
            found.append(peer.entrant(one))
            if compiled and peer.scope is EAGER:
                found.append(replace(peer, note="compiled", scope=AS_IT_COMES).entrant(one))
    return found, sorted(missing)
