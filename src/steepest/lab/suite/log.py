"""The log of a suite: one row for each run, without its curves, small enough to be kept with the results.

On another machine the suite goes on from it. A row counts there if the workload still has the same fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from steepest.lab.race.trial import Record, Trial
from steepest.lab.shared.errors import BadInput
from steepest.lab.shared.fingerprints import digest, machine

COLUMNS = (
    *("workload", "optimizer", "setting", "steps", "seed", "loss"),
    *("model_ms", "optimizer_ms", "own_passes", "cpu_seconds", "machine"),
)


@dataclass(frozen=True)
class Row:
    """What is kept of a run."""

    workload: str
    """Its name in the results, which is a file's without folder and ending."""
    optimizer: str
    settings: Mapping[str, Any]
    """All that decides how it trains, as `steepest.lab.shared.contenders.Contender.settings` has it."""
    steps: int
    seed: int
    loss: float
    """The final validation loss; infinite if the run diverged or failed."""
    model_ms: float = math.nan
    """Time of a step for batch, forward and backward, in the mean over steps."""
    optimizer_ms: float = math.nan
    own_passes: bool = False
    """Whether the optimizer works during the model's passes, so that both times are its own."""
    cpu_seconds: float = 0.0
    """CPU time of the process of the trial, with all that it loads."""
    machine: str = ""
    failure: str = ""
    """Why there is no record; empty if there is one. Failed runs are tried again in the next call."""

    @classmethod
    def of(cls, name: str, trial: Trial, outcome: Record | str) -> Row:
        """Return the row of a trial on the workload of this name, which left a record or a reason why there is none."""
        setting = trial.contender.settings()
        if isinstance(outcome, str):
            return cls(name, trial.contender.label, setting, trial.steps, trial.seed, math.inf, failure=outcome)
        return cls(
            workload=name,
            optimizer=trial.contender.label,
            settings=setting,
            steps=trial.steps,
            seed=trial.seed,
            loss=outcome.final,
            model_ms=_mean_ms(outcome.model_seconds),
            optimizer_ms=_mean_ms(outcome.optimizer_seconds),
            own_passes=outcome.own_passes,
            cpu_seconds=outcome.cpu_seconds,
            machine=machine(),
        )

    @property
    def key(self) -> str:
        """What decides the result."""
        return key(self.workload, self.settings, self.steps, self.seed)


def key(workload: str, settings: Mapping[str, Any], steps: int, seed: int) -> str:
    """Return a hash of all that decides the result of a run on a workload."""
    return digest([workload, settings, steps, seed])


class Log:
    """Rows by what decides their result."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def add(self, row: Row) -> None:
        """Add a row, or replace the one of the same run."""
        self._rows[row.key] = row

    def find(self, name: str, trial: Trial) -> Row | None:
        """Return the row of a trial on the workload of this name, under whatever label it was run."""
        return self._rows.get(key(name, trial.contender.settings(), trial.steps, trial.seed))

    def machines(self) -> list[str]:
        """Return the names of the machines on which rows were run."""
        return list(dict.fromkeys(row.machine for row in self if not row.failure))

    def as_json(self) -> dict[str, Any]:
        """Return the rows of runs that did not fail, with settings and machines named once and referred to by index."""
        rows = sorted(
            (row for row in self if not row.failure),
            key=lambda row: (row.workload, row.optimizer, digest(row.settings), row.steps, row.seed),
        )
        settings: dict[str, Mapping[str, Any]] = {digest(row.settings): row.settings for row in rows}
        numbers, machines = {key: i for i, key in enumerate(settings)}, self.machines()
        return {
            "settings": list(settings.values()),
            "machines": machines,
            "columns": list(COLUMNS),
            "rows": [
                [
                    *(row.workload, row.optimizer, numbers[digest(row.settings)], row.steps, row.seed),
                    *(_finite(row.loss), _finite(row.model_ms), _finite(row.optimizer_ms), row.own_passes),
                    *(row.cpu_seconds, machines.index(row.machine)),
                ]
                for row in rows
            ],
        }


def rows_from_json(results: Mapping[str, Any], source: str) -> Iterable[Row]:
    """Return the rows of results that a suite has written to the file ``source``.

    Raises:
        BadInput: if these are no results of a suite.
    """
    try:
        trials = results["trials"]
        for values in trials["rows"]:
            row = dict(zip(trials["columns"], values, strict=True))
            settings, where = trials["settings"][row.pop("setting")], trials["machines"][row.pop("machine")]
            loss = math.inf if row["loss"] is None else row["loss"]
            times = {name: math.nan for name in ("model_ms", "optimizer_ms") if row[name] is None}
            yield Row(**row | times | {"loss": loss, "settings": settings, "machine": where})
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadInput(f"{source}: holds no results of steepest suite; it writes them to suite.json") from error


def _mean_ms(seconds: list[float]) -> float:
    """Return the mean in milliseconds, to six digits as in all records; NaN of nothing."""
    return float(f"{1e3 * fmean(seconds):.6g}") if seconds else math.nan


def _finite(value: float) -> float | None:
    """Return the number, or None if it is not finite, which JSON does not allow."""
    return value if math.isfinite(value) else None
