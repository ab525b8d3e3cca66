"""The curvature of a model's layers: K-FAC's statistics, captured in ordinary training passes."""

from steepest.curvature.capture import Curvature, Statistics
from steepest.curvature.factors import KroneckerFactors, kfac_factors
from steepest.curvature.layer import Layer, layers, unsupported

__all__ = ["Curvature", "KroneckerFactors", "Layer", "Statistics", "kfac_factors", "layers", "unsupported"]
