"""The preprocessing tool as a command."""

from pathlib import Path

from ascendspeed.data.indexed.megatron_pair import pair_file

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"


def made(prefix):
    """The bytes of all three files."""
    return {suffix: pair_file(prefix, suffix).read_bytes() for suffix in ("bin", "idx", "meta")}
