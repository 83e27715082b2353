"""This project's own training checkpoint, read as its fp32 master weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.conversion.formats.base import CheckpointFormat, Direction, ReadOptions

if TYPE_CHECKING:
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader


class TrainingCheckpointFormat(CheckpointFormat):
    """A folder of training steps, or one step. Written by training, not by a conversion."""

    name = "training"
    contents = "a training checkpoint"
    marker_files = "latest and step_NNNNNNN"

    def supports(self, family: str, direction: Direction) -> bool:
        """True for reading."""
        return direction == "read"

    def detect(self, folder: Path) -> bool:
        """True if the folder holds, or is, a training checkpoint."""
        return looks_like_checkpoint(folder)

    def takes_precedence(self, folder: Path) -> bool:
        """True: the file `latest` of a training checkpoint has the name of DeepSpeed's tracker."""
        return True

    def open(self, folder: Path, options: ReadOptions) -> "CheckpointReader":
        """Opens the newest complete step; adapters are merged into their base weights."""
        from ascendspeed.conversion.formats.training_checkpoint.reading import open_training_folder

        return open_training_folder(folder, options)
