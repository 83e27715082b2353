"""Rank files: one file for each tensor-parallel rank and pipeline stage, in Megatron's layout and in
DeepSpeed's.
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


class MegatronFormat(CheckpointFormat):
    """Rank files in Megatron's layout."""

    name = "megatron"
    summary = "rank files"
    contents = "Megatron rank files"
    marker_files = "latest_checkpointed_iteration.txt"
    write_options = ("tp", "pp", "make_vocab_size_divisible_by")

    def supports(self, family: str, direction: Direction) -> bool:
        """True: every family has Megatron-core names."""
        return True

    def detect(self, folder: Path) -> bool:
        """True if there is the tracker file of the layout, or the files of one iteration."""
        from ascendspeed.conversion.formats.megatron.file_names import MEGATRON, file_names_of

        return file_names_of(folder) is MEGATRON

    def open(self, folder: Path, options: ReadOptions) -> "CheckpointReader":
        """Opens the rank files; their layout and parameter names are detected."""
        from ascendspeed.conversion.formats.megatron.reading import open_rank_files

        return open_rank_files(folder, options.config_dir)

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer for `tp` x `pp` ranks."""
        from ascendspeed.conversion.formats.megatron.writing import RankFileWriter

        divisor = options.make_vocab_size_divisible_by
        return RankFileWriter(options.tp, options.pp, make_vocab_size_divisible_by=divisor)


class DeepSpeedFormat(MegatronFormat):
    """Rank files in the layout of the DeepSpeed recipe, which has no pipeline stages."""

    name = "deepspeed"
    summary = "rank files of the DeepSpeed recipe"
    contents = "DeepSpeed rank files"
    marker_files = "latest"
    write_options = ("tp", "make_vocab_size_divisible_by")

    def detect(self, folder: Path) -> bool:
        """True if there is the tracker file of the layout, or the files of one iteration."""
        from ascendspeed.conversion.formats.megatron.file_names import DEEPSPEED, file_names_of

        return file_names_of(folder) is DEEPSPEED

    def writer(self, options: WriteOptions) -> CheckpointWriter:
        """Returns a writer for `tp` ranks."""
        from ascendspeed.conversion.formats.megatron.writing import RankFileWriter

        divisor = options.make_vocab_size_divisible_by
        return RankFileWriter(options.tp, deepspeed=True, make_vocab_size_divisible_by=divisor)


class LegacyRankFileFormat(CheckpointFormat):
    """Rank files with parameter names from before Megatron-core (`legacy_names`); `megatron` and `deepspeed`
    open them.
    """

    name = "ascendspeed"

    def supports(self, family: str, direction: Direction) -> bool:
        """True for reading families without experts and norms of heads, which the old programs did not
        have."""
        entry = FAMILIES[family]
        has_new = entry.has_experts or entry.implicit_config.get("qk_layernorm", False)
        return direction == "read" and not has_new
