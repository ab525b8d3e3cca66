"""Functions that the ranks run under torch's other ways to share a model: FSDP1, and ZeRO-1 over DDP."""

from __future__ import annotations

from typing import Any

import torch
from models import differing, inject, toy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from steepest import Optimizer, for_model, route


def _flattened(model: nn.Module, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def _small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double()


def refused(rule: str, use_orig_params: bool) -> list[str]:
    """Return what an optimizer, and `for_model`, say to a model that FSDP1 has flattened."""
    model = _flattened(_small(), use_orig_params)
    said = []
    for make in (lambda: Optimizer(model.parameters(), rule=rule, lr=0.1), lambda: for_model(model, rule, lr=0.1)):
        try:
            make()
        except ValueError as error:
            said.append(str(error))
    return said


def _trained(model: nn.Module, opt: torch.optim.Optimizer) -> list[Tensor]:
    """Take five steps and return the model's outputs after each."""
    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for _ in range(5):
        y = model(x)
        outputs.append(y.detach())
        opt.zero_grad()
        y.square().mean().backward()
        opt.step()
    return outputs


def flat_parts(rule: str, use_orig_params: bool, options: dict[str, Any]) -> list[list[Tensor]]:
    """Return the outputs of a model that an elementwise rule trains: in one process, and flattened by FSDP1."""
    one, many = _small(), _flattened(_small(), use_orig_params)
    return [_trained(model, Optimizer(model.parameters(), rule=rule, lr=0.01, **options)) for model in (one, many)]


def warned(use_orig_params: bool) -> list[str]:
    """Return the warnings of a model that FSDP1 has flattened, if it is wanted elementwise."""
    return list(route(_flattened(_small(), use_orig_params), "adamw").warnings)


def flat_parts_of_torch(use_orig_params: bool, options: dict[str, Any]) -> list[Tensor]:
    """Return the outputs of the flattened model as torch's AdamW trains it."""
    model = _flattened(_small(), use_orig_params)
    return _trained(model, torch.optim.AdamW(model.parameters(), lr=0.01, **options))


def divided(rule: str, as_views: bool) -> tuple[list[str], int]:
    """Take four steps under ZeRO-1; return the parameters that differ from one process, and how many this rank has."""
    return _divided(toy(), toy(), rule, as_views)


def divided_one(rule: str, as_views: bool) -> tuple[list[str], int]:
    """Do the same with one matrix for all ranks."""
    return _divided(*(nn.Sequential(_small()[0]) for _ in range(2)), rule, as_views)


def _divided(one: nn.Module, many: nn.Module, rule: str, as_views: bool) -> tuple[list[str], int]:
    many = DistributedDataParallel(many)
    here = Optimizer(one.parameters(), rule=rule, lr=0.02)
    there = ZeroRedundancyOptimizer(
        many.parameters(), Optimizer, parameters_as_bucket_view=as_views, rule=rule, lr=0.02
    )
    for step in range(4):
        for model, opt in ((one, here), (many, there)):
            inject(model, step)
            opt.step()
    return differing(many, one), sum(len(group["params"]) for group in there.optim.param_groups)


def reordered() -> str:
    """Return what an optimizer says if one rank gives it DDP's parameters, of equal shapes, in another order."""
    many = DistributedDataParallel(nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)]))
    params = list(many.parameters())
    if torch.distributed.get_rank() == 1:
        params.reverse()
    try:
        Optimizer(params, rule="soap", lr=0.1)
    except RuntimeError as error:
        return str(error)
    return "nothing"
