"""Writes rank files under Megatron-core's parameter names."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ascendspeed.config.pipeline_stages import check_pipeline_parallel
from ascendspeed.config.schema import ParallelConfig, check_tensor_parallel, padded_vocab_size
from ascendspeed.conversion import hf_assets, rank_files
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.megatron.file_names import DEEPSPEED, MEGATRON
from ascendspeed.conversion.formats.megatron.reading import MEGATRON_CORE
from ascendspeed.conversion.output_files import create_pt
from ascendspeed.conversion.rank_file_names import RankFileNames
from ascendspeed.conversion.rank_files import RankLayout
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.utils.errors import UserError

RELEASE = "release"
"""Name of an iteration that was converted, not trained."""


@dataclass(frozen=True)
class RankFileWriter:
    """Writer of rank files for `tp` x `pp` ranks."""

    tp: int = 1
    pp: int = 1
    deepspeed: bool = False
    """Writes the layout of the DeepSpeed recipe, which has no pipeline stages."""
    make_vocab_size_divisible_by: int = 128

    def check(self, reader: CheckpointReader) -> None:
        """Raises `UserError` if the model does not split over these ranks."""
        if self.deepspeed and self.pp > 1:
            raise UserError(
                f"the DeepSpeed layout has no pipeline stages: leave --deepspeed out, or set them to 1 (not "
                f"{self.pp})"
            )
        if self.make_vocab_size_divisible_by < 1:
            raise UserError(f"the vocabulary cannot be made divisible by {self.make_vocab_size_divisible_by}")
        check_tensor_parallel(reader.config, self.tp)
        check_pipeline_parallel(reader.config, self.pp)

    def files(self, reader: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """Plans one file for every rank."""
        file_names = self._file_names()
        config = reader.config
        parallel = ParallelConfig(
            self.tp, self.pp, make_vocab_size_divisible_by=self.make_vocab_size_divisible_by
        )
        stages = (config.num_layers // self.pp,) * self.pp
        layout = RankLayout(self.tp, stages, padded_vocab_size(config, parallel))
        create = partial(create_pt, wrap=lambda tensors: {**file_names.extra, file_names.key: tensors})
        return [
            PlannedFile(
                f"{RELEASE}/{file_names.path(t, p, self.pp)}",
                tuple(rank_files.stored_tensors(config, MEGATRON_CORE, layout, t, p)),
                create,
            )
            for t in range(self.tp)
            for p in range(self.pp)
        ]

    def finish(self, reader: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes config.json and the tokenizer, and last the tracker file."""
        hf_assets.write(reader, folder, reader.config, dtype)
        (folder / self._file_names().tracker).write_text(RELEASE)

    def _file_names(self) -> RankFileNames:
        return DEEPSPEED if self.deepspeed else MEGATRON
