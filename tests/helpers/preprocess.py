"""Path of the preprocessing tool, and the content of its output files."""

from pathlib import Path

from ascendspeed.data.indexed.megatron_pair import pair_file

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def read_pair(prefix):
    """Returns the content of a pair's three files by suffix."""
    return {suffix: pair_file(prefix, suffix).read_bytes() for suffix in ("bin", "idx", "meta")}
