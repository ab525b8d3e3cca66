"""What a rule is: options that check themselves, gradients in, directions out."""

from steepest.rule.options import (
    Options,
    at_least,
    beta,
    betas,
    check,
    check_choice,
    checked,
    flag,
    frequency,
    nearest,
    number,
    one_of,
)
from steepest.rule.refreshing import THE_END, Refreshing, revive
from steepest.rule.rule import Elementwise, LowRank, Rule, Slots, State, Step, whole

__all__ = [
    "THE_END",
    "Elementwise",
    "LowRank",
    "Options",
    "Refreshing",
    "Rule",
    "Slots",
    "State",
    "Step",
    "at_least",
    "beta",
    "betas",
    "check",
    "check_choice",
    "checked",
    "flag",
    "frequency",
    "nearest",
    "number",
    "one_of",
    "revive",
    "whole",
]
