"""The public names of steepest, which the package imports from here when the first of them is used."""

from steepest.adopting import adopt
from steepest.clipping import QKClip, qk_clip
from steepest.engine.optimizer import Optimizer
from steepest.functional import (
    all_eigenbases_met_criteria,
    conjugate,
    eigh_with_fallback,
    get_eigenbasis_eigh,
    get_eigenbasis_qr,
    init_kronecker_factors,
    orthogonal_iteration,
    precondition,
    update_eigenbasis_and_exp_avgs,
    update_kronecker_factors,
    update_kronecker_factors_kl_shampoo,
)
from steepest.linalg.precision import fp32_matmul_precision
from steepest.newton.gauss_newton import GaussNewton
from steepest.newton.lbfgs import LBFGS
from steepest.newton.natural_gradient import NaturalGradient
from steepest.newton.newton_cg import NewtonCG
from steepest.newton.residual import Residual
from steepest.optimizers import create
from steepest.optimizers.kfac import EKFAC, KFAC
from steepest.optimizers.lion import Lion
from steepest.optimizers.muon import AdaMuon, Dion, Dion2, Muon, NorMuon
from steepest.optimizers.shampoo import KLShampoo, Shampoo
from steepest.optimizers.soap import MOSO, REKLS, SOAP, InverseRootSOAP
from steepest.recipes import recipe
from steepest.routing import for_model, route
from steepest.schedules import CosineSchedule, LinearSchedule, StepSchedule

__all__ = [
    "EKFAC", "KFAC", "LBFGS", "MOSO", "REKLS", "SOAP", "AdaMuon", "CosineSchedule", "Dion", "Dion2", "GaussNewton",
    "InverseRootSOAP", "KLShampoo", "LinearSchedule", "Lion", "Muon", "NaturalGradient", "NewtonCG", "NorMuon",
    "Optimizer", "QKClip", "Residual", "Shampoo", "StepSchedule",
    "adopt", "all_eigenbases_met_criteria", "conjugate", "create", "eigh_with_fallback", "for_model",
    "fp32_matmul_precision", "get_eigenbasis_eigh", "get_eigenbasis_qr", "init_kronecker_factors",
    "orthogonal_iteration", "precondition", "qk_clip", "recipe", "route", "update_eigenbasis_and_exp_avgs",
    "update_kronecker_factors", "update_kronecker_factors_kl_shampoo",
]  # fmt: skip
