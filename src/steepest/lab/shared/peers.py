"""The optimizers of other libraries, each set to do the work that ours in its family does.

They get our learning rate, decay, moments and frequency. The other settings stand here and in docs/benchmarks.md.
``steepest bench`` times them; those of `RACING` also race, as contenders.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import steepest
from steepest.lab.shared.errors import BadInput, one_line
from steepest.rule import Elementwise, nearest
from steepest.rules import RULES

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

    def make(self, params: list[nn.Parameter], settings: Options) -> Optimizer:
        """Return the optimizer of these parameters, with its constructor's options. It imports the library."""
        groups = [{"params": params, "use_muon": True}] if self.grouped else params
        made: Optimizer = self.load()(groups, **settings)
        return made

    def load(self) -> Callable[..., Optimizer]:
        """Import the library, and return the optimizer's class."""
        found: Callable[..., Optimizer] = getattr(import_module(self.package), self.name)
        return found


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
scaled_muon = _options("lr momentum weight_decay nesterov", use_adjusted_lr=True)
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
    Peer("muon", "pytorch_optimizer", "Muon", scaled_muon, grouped=True),
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

# Peers as contenders.


def _peer(package: str, name: str) -> Peer:
    """Return the peer of this name in a package."""
    return next(peer for peer in PEERS if (peer.package, peer.name) == (package, name))


RACING: Mapping[str, tuple[Peer, str]] = {
    "pytorch_optimizer.soap": (_peer("pytorch_optimizer", "SOAP"), "soap-f10"),
    "pytorch_optimizer.muon": (_peer("pytorch_optimizer", "Muon"), "muon"),
    "pytorch_optimizer.schedule_free": (Peer("adamw", "pytorch_optimizer", "ScheduleFreeAdamW", adam), "adamw"),
}
"""Contenders' names, the peers that they are, and the presets of ours whose settings they get."""


def is_installed(name: str) -> bool:
    """Return whether the package of a contender of `RACING` can be imported."""
    return importlib.util.find_spec(RACING[name][0].package) is not None


@cache
def version_of(name: str) -> str:
    """Return the version of the package that a contender of `RACING` comes from."""
    return importlib.metadata.version(RACING[name][0].package)


def peer_optimizer(name: str, model: nn.Module, options: Options, elementwise: Options) -> Optimizer:
    """Return a contender of `RACING` for a model.

    It steps all parameters if our optimizer of its kind is elementwise. Otherwise it steps the hidden matrices, which
    are those that `steepest.route` gives to ours, and ours steps the rest. It gets each parameter whole, where ours may
    see several matrices in it.

    Raises:
        BadInput: if its library can't be imported.
        ValueError: for options that it has not, or that it refuses.
    """
    peer, _ = RACING[name]
    try:
        known = inspect.signature(peer.load()).parameters
    except ImportError as error:
        raise BadInput(f'optimizer {name}: {one_line(error)}; pip install "steepest[peers]"') from error
    for option, value in options.items():
        if option not in known:  # the library would ignore it
            raise ValueError(
                f"{option}={value!r}: {peer.package}.{peer.name} has no such option{nearest(option, known)}"
            )
    if issubclass(RULES[peer.kind], Elementwise):
        return _made(peer, list(model.parameters()), options)
    routing = steepest.route(model, peer.kind)
    groups = routing.groups({option: options[option] for option in ("lr", "weight_decay")}, elementwise)
    for group in groups:
        group["params"] = [param for _, param in group["params"]]  # other libraries' groups have no names
    matrices = [param for group in groups if group["rule"] == peer.kind for param in group["params"]]
    rest = [group for group in groups if group["rule"] != peer.kind]
    parts: list[Optimizer] = [steepest.Optimizer(rest, rule=routing.elementwise, lr=options["lr"])] if rest else []
    if matrices:
        parts.insert(0, _made(peer, matrices, options))
    return Together(parts)


def _made(peer: Peer, params: list[nn.Parameter], options: Options) -> Optimizer:
    try:
        return peer.make(params, options)
    except Exception as error:  # the library has exceptions of its own for bad values
        raise ValueError(one_line(error)) from error


class Together(Optimizer):
    """Optimizers of different parameters of a model, as one whose groups and state are theirs."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Let each of them step along the gradients that are there."""
        for part in self.parts:
            part.step()
            self.state.update(part.state)
