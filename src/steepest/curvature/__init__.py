"""The curvature of a model's layers: K-FAC's statistics, captured in ordinary training passes."""

from steepest.curvature.capture import Curvature, Statistics
from steepest.curvature.layers import Layer, layers, unsupported

__all__ = ["Curvature", "Layer", "Statistics", "layers", "unsupported"]
