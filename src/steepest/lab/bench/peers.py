"""The entrants of ``steepest bench`` that other libraries provide: for each of ours, the peers in its family."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace

import torch

from steepest.engine.group import option_defaults
from steepest.lab.bench.entrants import Entrant, Family
from steepest.lab.shared.peers import AS_IT_COMES, EAGER, PACKAGES, PEERS, Peer


def entrant(peer: Peer, ours: Entrant) -> Entrant:
    """Return the peer of one of our entrants. Its library is imported when it is made."""
    settings = peer.settings(option_defaults(ours.rule.name) | dict(ours.settings))

    def make(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return peer.make(params, settings)

    label = f"{peer.package}.{peer.name}" + (f" {peer.note}" if peer.note else "")
    label += f" f{ours.family.frequency}" if ours.family.frequency else ""
    label += f" ({ours.family.max_precond_dim})" if ours.family.max_precond_dim else ""
    return Entrant(label, ours.family, ours.rule, make, settings, ours=False, scope=peer.scope)


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
            found.append(entrant(peer, one))
            if compiled and peer.scope is EAGER:
                found.append(entrant(replace(peer, note="compiled", scope=AS_IT_COMES), one))
    return found, sorted(missing)
