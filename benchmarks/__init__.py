"""Benchmarks; README.md describes them."""

import sys
from pathlib import Path

sys.path.append(
    str(Path(__file__).parent)
)  # `python -m benchmarks.generate` finds the modules beside it as `python benchmarks/generate.py` does
