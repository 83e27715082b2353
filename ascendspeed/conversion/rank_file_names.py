"""File names of rank files. No torch, so that commands recognize a folder at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankFileNames:
    """File names of rank files and the structure around the tensors in each file."""

    description: str
    tracker: str
    """File that names the folder of the iteration."""
    files: tuple[str, str]
    """Path of rank `t` and stage `p` in that folder: without and with pipeline stages."""
    pattern: str
    """Regular expression of both paths: tensor-parallel rank, then (optional) stage."""
    key: str
    """Entry of a file that holds the tensors; empty: they are at the top level."""
    extra: Mapping[str, Any]
    """Other entries of a written file."""

    def path(self, tp_rank: int, pp_rank: int, pp: int) -> str:
        """Path of one rank's file in the folder of the iteration."""
        return self.files[pp > 1].format(t=tp_rank, p=pp_rank)
