"""Checks before anything is trained: what can't be run is refused in one line, and not in the middle of a race."""

from __future__ import annotations

import warnings

import torch

from steepest.lab.race.stepping import gradients, stepper
from steepest.lab.race.training import validate
from steepest.lab.shared.contenders import Contender
from steepest.lab.shared.errors import BadInput, one_line
from steepest.lab.workloads.workload import Workload


def check_workload(name: str, workload: Workload) -> None:
    """Check that the workload's first step and its validation run.

    Raises:
        BadInput: if they don't.
    """
    torch.manual_seed(0)
    try:
        model = workload.model()
        gradients(model, workload, workload.batch(torch.Generator().manual_seed(0)))
        validate(model, workload)
    except Exception as error:
        raise BadInput(f"workload {name}: {one_line(error)}") from error


def check_contender(contender: Contender, workload: Workload) -> bool:
    """Check that the contender's settings are valid, and that the workload has what its optimizer needs.

    Returns:
        Whether the optimizer steps along gradients that it is given, at the learning rate of a schedule. Others
        evaluate the loss themselves.

    Raises:
        BadInput: if the contender can't train the workload.
    """
    model = workload.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who can run says so in the trial
        contender.check(model)
        optimizer = contender.optimizer(model)
    try:
        return stepper(model, optimizer, workload, torch.Generator()).scheduled
    except BadInput as error:
        raise BadInput(f"optimizer {contender.label}: {error}") from error
