"""Which processes have trained a `quick_task`, and whether any of them still does."""

import os
import subprocess
from pathlib import Path


def processes(task: Path) -> list[str]:
    """Return the numbers of all processes but this one that have made a model of the task."""
    numbers = [path.suffix[1:] for path in task.parent.glob(f"{task.stem}.*") if path.suffix[1:].isdecimal()]
    return [number for number in numbers if int(number) != os.getpid()]


def alive(task: Path) -> list[str]:
    """Return those of them that have not ended."""
    states = {
        number: subprocess.run(["ps", "-o", "stat=", "-p", number], capture_output=True, text=True).stdout
        for number in processes(task)
    }
    return [number for number, state in states.items() if state.strip() and not state.startswith("Z")]
