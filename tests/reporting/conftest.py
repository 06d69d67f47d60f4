"""Where the made-up records are."""

import sys
from pathlib import Path

for _folder in ("report", "sweeping"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _folder))
