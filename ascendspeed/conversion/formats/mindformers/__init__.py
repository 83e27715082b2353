"""Checkpoints of MindFormers: MindSpore's `.ckpt`, one file with the whole model under MindFormers' parameter
names.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed.conversion.formats.base import (
    CheckpointFormat,
    CheckpointWriter,
    Direction,
    ReadOptions,
    WriteOptions,
)
from ascendspeed.models.families import FAMILIES

if TYPE_CHECKING:
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader


class MindFormersFormat(CheckpointFormat):
    """A folder with one `.ckpt`."""

    name = "mindformers"
    summary = "one .ckpt of MindFormers (MindSpore)"
    contents = "a .ckpt of MindFormers"
    marker_files = "*.ckpt"

    def supports(self, family: str, direction: Direction) -> bool:
        """True for the families that MindFormers has under these parameter names."""
        return self.name in FAMILIES[family].extra_formats

    def detect(self, folder: Path) -> bool:
        """True if there is a `.ckpt`."""
        return any(folder.glob("*.ckpt"))

    def open(self, folder: Path, options: ReadOptions) -> "CheckpointReader":
        """Opens the `.ckpt`."""
        from ascendspeed.conversion.formats.mindformers.reading import open_ckpt

        return open_ckpt(folder, options.config_dir, self)

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer of one `.ckpt`."""
        from ascendspeed.conversion.formats.mindformers.writing import MindFormersWriter

        return MindFormersWriter(self)
