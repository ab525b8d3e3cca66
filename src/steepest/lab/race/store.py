"""The store keeps one JSON file per run, named by a hash of all that decides its result, so that races can continue."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steepest.lab.race.trial import Record, Run, Trial
from steepest.lab.shared.files import make_folder, write
from steepest.lab.shared.fingerprints import digest, library_hash, machine, versions


class Store:
    """A folder of records of a workload that has this fingerprint."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        make_folder(folder)

    def identity(self, trial: Trial) -> dict[str, Any]:
        """Return all that decides the trial's result, its times included."""
        return {
            "workload": trial.workload,
            "data": self.fingerprint,
            "contender": trial.contender.settings(),
            "steps": trial.steps,
            "seconds": trial.seconds,
            "seed": trial.seed,
            "poison": trial.poison,
            "versions": versions(),
            "code": library_hash(),
            "machine": machine(),
        }

    def path(self, trial: Trial) -> Path:
        """Return the path of the trial's record; its name is for people, and the hash in it decides."""
        label = re.sub(r"[^a-z0-9.]+", "-", trial.contender.label.lower()).strip("-")[:48]
        poisoned = f"-poison{trial.poison:g}" if trial.poison else ""
        rate = "" if not trial.contender.lr else f"-lr{trial.contender.lr:g}"
        length = f"{trial.seconds:g}s" if trial.seconds else trial.steps
        name = f"{label}{rate}-{length}-seed{trial.seed}{poisoned}"
        return self.folder / f"{name}-{digest(self.identity(trial))[:12]}.json"

    def find(self, trial: Trial) -> Run | None:
        """Return the trial's run if it was run before, under whatever label."""
        ending = self.path(trial).name[-len("0123456789ab.json") :]
        for path in self.folder.glob(f"*-{ending}"):
            try:
                return Run(trial, Record(**json.loads(path.read_text())["record"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the file holds no record: run the trial again
        return None

    def save(self, run: Run) -> None:
        """Write the run to a file, which appears complete or not at all."""
        content = {
            "identity": self.identity(run.trial),
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "record": run.record.as_json(),
        }
        write(self.path(run.trial), json.dumps(content))
