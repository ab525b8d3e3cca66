"""Run every section: ``python benchmarks/gpu``."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[0] = str(BENCHMARKS)  # not this folder, whose names would hide others
sys.path.insert(0, str(BENCHMARKS.parent / "src"))  # before any installed steepest

from gpu.session import main  # noqa: E402

sys.exit(main())
