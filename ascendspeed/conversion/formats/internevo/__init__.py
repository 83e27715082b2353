"""Training folders of InternEvo: a file for every rank and stage, as its trainer writes and loads them.

Tensor parallel: `model_tp{t}_pp{p}.pt`. Weight parallel (isp): `model_wp{w}_pp{p}.pt`, early in 2024
`model_tp{t}_wp{w}_pp{p}.pt`, for those ranks only that differ. Layers count from 0 on every stage; stages may
be of any length. The optimizer's and the trainer's own files (`optimizer_*`, `context.pt`, `schedulder.pt`,
`sampler*.pt`, `topo_*`) are not opened.
"""

from dataclasses import fields
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
from ascendspeed.models.families.internevo_names import InternEvoOptions

if TYPE_CHECKING:
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader


class InternEvoFormat(CheckpointFormat):
    """A training folder of InternEvo."""

    name = "internevo"
    summary = "training folder"
    contents = "an InternEvo training folder"
    marker_files = "model_tp0_pp0.pt"
    read_options = tuple(option.name for option in fields(InternEvoOptions) if option.name != "family")
    write_options = ("tp", "pp", "wp", "internevo_version", "embed_split")

    def supports(self, family: str, direction: Direction) -> bool:
        """True for families that InternEvo trains."""
        return bool(FAMILIES[family].internevo_types)

    def detect(self, folder: Path) -> bool:
        """True if there are rank files under InternEvo's names. Raises `UserError` for forms that cannot be
        read.
        """
        from ascendspeed.conversion.formats.internevo.file_names import file_names_of

        return file_names_of(folder) is not None

    def open(self, folder: Path, options: ReadOptions) -> "CheckpointReader":
        """Opens the folder."""
        from ascendspeed.conversion.formats.internevo.reading import open_training_folder

        return open_training_folder(folder, options.config_dir, options.internevo)

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer for tensor- or weight-parallel ranks and pipeline stages."""
        from ascendspeed.conversion.formats.internevo.writing import InternEvoWriter

        return InternEvoWriter(
            options.tp,
            options.pp,
            options.wp,
            version=options.internevo_version,
            embed_split=options.embed_split,
        )
