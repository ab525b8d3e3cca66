"""The words that options take, as types: a type checker refuses the others before anything runs."""

from typing import Literal

DecayMethod = Literal["decoupled", "independent", "palm", "cautious", "l2"]
Nonfinite = Literal["skip", "raise"]
Precision = Literal["highest", "high", "medium"]
Solver = Literal["auto", "qr", "cholesky", "first_order", "eigh"]
BasisTiming = Literal["before", "after"]
BasisDtype = Literal["float32", "bfloat16"]
MomentDtype = Literal["float32", "int8"]
Graft = Literal["none", "sgd", "adam", "rmsprop"]
Polar = Literal[
    "keller", "quintic_you", "polar_express_5", "polar_express_dion", "cans", "cubic5", "deepseekv4", "exact"
]
PolarDtype = Literal["auto", "float32", "bfloat16", "float16"]
Scale = Literal[
    "none",
    "original",
    "match_rms_adamw",
    "mup",
    "shape_scaling",
    "rms_norm",
    "spectral_norm",
    "unit_rms_norm",
]
Orthonormalizer = Literal["qr", "rcqr"]
Axis = Literal["rows", "columns"]
DampingForm = Literal["relative", "absolute"]
SpectrumDamping = Literal["factored", "relative", "absolute"]
ClipWith = Literal["momentum", "gradient"]
CurvatureForm = Literal["inverse", "eigen"]
Fisher = Literal["empirical", "sampled"]
Sharing = Literal["expand", "reduce"]
MosoInner = Literal["adam", "rmsprop"]
