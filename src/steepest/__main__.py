"""The command ``python -m steepest``, the same as ``steepest``."""

from steepest.cli import main

main()
