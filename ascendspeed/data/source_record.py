"""Identity of the input and the settings from which indexed data are made: another run may replace
only data that are made from the same."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ascendspeed.data.indexed.megatron_pair import pair_file, read_facts
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.file_samples import hash_samples

SOURCE = "source"
"""Key of the identity in P.meta."""


def source_digest(files: Iterable[Path], settings: object) -> str:
    """Returns a digest of the names, sizes, beginnings and ends of files, and of settings.

    It does not depend on time and place, and whole files need not be read. Raises `OSError`.
    """
    entries = [(path.name, hash_samples(path, samples=2)) for path in files]
    text = json.dumps([entries, settings], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_other_source(prefixes: Sequence[str], source: str) -> None:
    """Raises `UserError` if one of the prefixes already holds data that are made from another source."""
    for prefix in prefixes:
        index = pair_file(prefix, "idx")
        if index.is_file() and read_facts(prefix).get(SOURCE) != source:
            raise UserError(
                f"{index} exists, and is not made from these files with these settings: choose another "
                "--output, or replace it with --overwrite"
            )
