"""Files: Python files that users name, folders for results, and writing that leaves no half-written file."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from steepest.lab.shared.errors import BadInput, one_line

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers for an exhausted disk, quota, or limit to the size of a file."""


def import_file(path: Path, role: str) -> ModuleType:
    """Import a Python file, which may import modules from its own folder; errors call the file by its ``role``.

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
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{role} {path}: can't be imported: {one_line(error)}") from error
    return module


def make_folder(folder: Path) -> None:
    """Make a folder, unless it exists, and check that files can be written to it.

    Raises:
        BadInput: if the folder can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"{_complaint(folder, error)}, or give another folder by --out") from error


def write(path: Path, text: str) -> None:
    """Write a file such that it appears complete or not at all, even if the process or the machine stops meanwhile.

    Raises:
        BadInput: if the disk is full or the folder can't be written to. The folder's content is then as before.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # some file systems report only here that they are full
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise BadInput(f"{_complaint(path.parent, error)}, and the same command continues: runs are kept") from error


def _complaint(folder: Path, error: OSError) -> str:
    """Say why a folder can't be written to, and what to do about it.

    >>> _complaint(Path("runs"), OSError(errno.ENOSPC, "No space left on device"))
    "can't write to runs: No space left on device; make room there"
    """
    remedy = "make room there" if error.errno in DISK_FULL else "make it writable"
    return f"can't write to {folder}: {error.strerror}; {remedy}"
