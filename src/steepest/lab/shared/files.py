"""Python files that people hand over by name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from steepest.lab.shared.errors import BadInput, one_line


def import_file(path: Path, role: str) -> ModuleType:
    """The file as a module; like a script, it may import what lies beside it. ``role`` is what an error calls it.

    Raises:
        BadInput: if there is no such Python file, or it can't be imported.

    >>> import_file(Path("nowhere.py"), "model file")
    Traceback (most recent call last):
    steepest.lab.shared.errors.BadInput: model file nowhere.py: no such file
    """
    if not path.is_file():
        raise BadInput(f"{role} {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"steepest_{role.replace(' ', '_')}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{role} {path}: must be a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.append(beside)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{role} {path}: can't be imported: {one_line(error)}") from error
    return module
