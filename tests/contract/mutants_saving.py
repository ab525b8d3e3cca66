"""Optimizers that break clauses on saving and loading."""

from __future__ import annotations

import contextlib
from typing import Any

from mutants import Habit, Mutants, parameters

MUTANTS = Mutants()
breaks = MUTANTS.breaks


class KeepsObject(Habit):
    """An optimizer that saves an object with every parameter's state, and drops it before loading."""

    extra: Any = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for named in state["state"].values():
            named["extra"] = self.extra
        return state

    def loading(self, saved: dict[str, Any]) -> None:
        for named in saved["state"].values():
            named.pop("extra", None)


@breaks("plain_state", "resume_flattened")
class KeepsList(KeepsObject):
    extra = (1.0, 2.0)


@breaks("plain_state", "weights_only")
class KeepsClass(KeepsObject):
    extra = slice(0, 1)


@breaks("resume_float32", "resume_untrained", "damaged_state")
class ForgetsTheClock(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        for key, named in self.state_dict()["state"].items():
            if key in saved["state"]:
                saved["state"][key] = named | saved["state"][key]
                saved["state"][key]["step"] = named["step"]


@breaks("resume_bfloat16")
class LoadsAsTorchDoes(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        dtype = next(parameters(self)).dtype
        for named in saved["state"].values():
            named |= {name: x.to(dtype) for name, x in named.items() if x.is_floating_point()}


@breaks("resume_untrained")
class SkipsUntrained(Habit):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(named["step"].max() > 0 for named in state_dict["state"].values()):
            super().load_state_dict(state_dict)


@breaks("resume_frozen")
class WantsAllState(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        if len(saved["state"]) < len(list(parameters(self))):
            raise KeyError("state")


@breaks("resume_distributed", "resume_flattened")
class KeysByAddress(Habit):
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"state": {id(named): named for named in state["state"].values()}}


@breaks("mismatched_state", "damaged_state")
class LoadsWhatFits(Habit):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with contextlib.suppress(ValueError):
            super().load_state_dict(state_dict)


@breaks("mismatched_state", "damaged_state")
class ClearsFirst(Habit):
    def loading(self, saved: dict[str, Any]) -> None:
        for state in self.state.values():
            state["exp_avg"].zero_()
