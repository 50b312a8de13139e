"""Makes `training_kit`, the small models and rows of the training tests, importable."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = next(str(p) for p in Path(__file__).parents if (p / "training_kit.py").is_file())
if TESTS not in sys.path:
    sys.path.append(TESTS)
