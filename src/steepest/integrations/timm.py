"""Names for timm: importing this module registers the optimizers of this package in timm's default registry.

    import steepest.integrations.timm
    optimizer = timm.optim.create_optimizer_v2(model, opt="soap", lr=3e-3, weight_decay=0.05)

timm takes what stands before an underscore for a prefix, so names have none: soap, klsoap, rekls, moso, normuon, dion,
... Names that timm has itself ("muon", "adamuon", "lion") stay timm's; ours are "steepestmuon" and so on. timm passes
groups without names, so shapes decide (`steepest.integrations.ByShape`); ``fallback_list=["head*"]`` says what is no
hidden matrix. ``lr_scale`` of ``layer_decay`` is multiplied in by timm's schedulers, as for every optimizer of timm.
Like timm's own, those with momentum get timm's ``momentum``, 0.9 unless it is given.
"""

from __future__ import annotations

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from steepest.engine.group import option_defaults
from steepest.integrations.by_shape import ByShape
from steepest.optimizers import NAMES
from steepest.routing.captured import captures


def register() -> dict[str, str]:
    """Register every optimizer that needs no model; return the names in timm by ours.

    >>> names = register()
    >>> names["kl-soap"], names["muon"]
    ('klsoap', 'steepestmuon')
    """
    taken = set(default_registry.list_optimizers())
    registered = {}
    for ours, entry in NAMES.items():
        if captures(entry.rule):
            continue
        bare = ours.replace("-", "")
        prefixed = f"steepest{bare}"
        known = bare in taken and default_registry.get_optimizer_info(bare).opt_class is not ByShape
        theirs = prefixed if known else bare
        if theirs not in taken:
            default_registry.register(
                OptimInfo(
                    name=theirs,
                    opt_class=ByShape,
                    description=f"{entry.optimizer.__name__.strip('_')} of steepest: {entry.paper}",
                    has_eps=True,
                    has_momentum="momentum" in option_defaults(entry.rule),
                    has_betas=True,
                    defaults={"name": ours},
                )
            )
        registered[ours] = theirs
    return registered


REGISTERED = register()
"""The names in timm, by ours."""
