"""Converts a checkpoint of any format to any other and, on request, proves that nothing changed.

The whole model is never in memory: sources are memory-mapped, targets are written in place, a block of one
tensor at a time.
"""

from pathlib import Path
from typing import Any

import torch

from ascendspeed.conversion import hf_assets
from ascendspeed.conversion import verify as verification
from ascendspeed.conversion import write as writing
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.base import CheckpointWriter
from ascendspeed.conversion.formats.huggingface.writing import HuggingFaceWriter
from ascendspeed.conversion.formats.internevo.writing import InternEvoWriter
from ascendspeed.conversion.formats.megatron.writing import RankFileWriter
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.conversion.hf_assets import with_tokenizer
from ascendspeed.conversion.output_files import write_json
from ascendspeed.conversion.verify import compare
from ascendspeed.utils.atomic import staged_folder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import of_bytes, progress
from ascendspeed.utils.text import parse_size

__all__ = [
    "DTYPES",
    "CheckpointReader",
    "HuggingFaceWriter",
    "InternEvoWriter",
    "RankFileWriter",
    "compare",
    "convert",
    "open_reader",
    "parse_size",
    "with_tokenizer",
    "write_hf",
    "write_megatron",
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OTHER_FILES_BYTES = 64 * 2**20
"""Disk space for headers, indices and the tokenizer."""


def convert(
    reader: CheckpointReader,
    target: str | Path,
    writer: CheckpointWriter,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    allow_nan: bool = False,
) -> dict[str, Any] | None:
    """Writes a checkpoint to the folder `target`, which must be empty or absent and appears when it is
    complete.

    `dtype`: type of the written tensors; None keeps the type of each. `verify`: reads the result back, proves
    that it is the same model (`verify.verify`), leaves the report in `conversion.json` and returns it. Raises
    `UserError`, also if a tensor holds NaN and not `allow_nan`.
    """
    if reader.config.reward_head and not isinstance(writer, HuggingFaceWriter):
        raise UserError(f"{reader.path} holds a reward model, which only --format hf and hf-llama can hold")
    writer.check(reader)
    hf_assets.check(reader)
    files = writer.files(reader, dtype)
    size = writing.size(reader, files, dtype)
    report = None
    with staged_folder(Path(target), size + OTHER_FILES_BYTES) as folder:
        with progress(of_bytes(f"writing {target}"), size) as advance:
            writing.write(reader, folder, files, dtype, advance, allow_nan)
        writer.finish(reader, folder, dtype)
        if verify:
            report = verification.verify(reader, open_reader(folder), dtype)
            write_json(folder / "conversion.json", report)
    return report


def write_hf(
    reader: CheckpointReader,
    target: str | Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "10GB",
    verify: bool = False,
    allow_nan: bool = False,
) -> None:
    """Writes a Hugging Face directory: under the model's own names, or those of another `family` ("llama").
    Raises `UserError`.
    """
    convert(reader, target, HuggingFaceWriter(family, parse_size(max_shard_size)), dtype, verify, allow_nan)


def write_megatron(
    reader: CheckpointReader,
    target: str | Path,
    tp: int,
    pp: int = 1,
    deepspeed: bool = False,
    make_vocab_size_divisible_by: int = 128,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    allow_nan: bool = False,
) -> None:
    """Writes rank files for `tp` x `pp` ranks, in Megatron's layout or in that of the DeepSpeed recipe.
    Raises `UserError`.
    """
    writer = RankFileWriter(tp, pp, deepspeed, make_vocab_size_divisible_by)
    convert(reader, target, writer, dtype, verify, allow_nan)
