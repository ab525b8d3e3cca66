import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]  # what test files share, by name
