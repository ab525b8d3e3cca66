"""What a rule is: options that check themselves, gradients in, directions out."""

from steepest.rule.options import (
    Options,
    at_least,
    beta,
    betas,
    check,
    check_choice,
    checked,
    frequency,
    nearest,
    one_of,
)
from steepest.rule.refreshing import THE_END, Refreshing
from steepest.rule.rule import Elementwise, Errand, LowRank, Rule, Slots, Solved, State, Step, whole

__all__ = [
    "THE_END",
    "Elementwise",
    "Errand",
    "LowRank",
    "Options",
    "Refreshing",
    "Rule",
    "Slots",
    "Solved",
    "State",
    "Step",
    "at_least",
    "beta",
    "betas",
    "check",
    "check_choice",
    "checked",
    "frequency",
    "nearest",
    "one_of",
    "whole",
]
