"""Scripts that measure; see README.md."""

import sys
from pathlib import Path

sys.path.append(
    str(Path(__file__).parent)
)  # `python -m benchmarks.generate` finds what lies beside it as `python benchmarks/generate.py` does
