"""Any checkpoint to any format: opens what lies somewhere, writes it elsewhere, and can prove that nothing changed.

The whole model is never in memory: sources are memory-mapped, targets are written in place, one tensor at a time.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from ascendspeed.conversion import hf_assets
from ascendspeed.conversion import verify as verification
from ascendspeed.conversion import write as writing
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.huggingface import HuggingFaceWriter
from ascendspeed.conversion.formats.internevo import InternEvoWriter
from ascendspeed.conversion.formats.megatron import RankFileWriter
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.conversion.hf_assets import with_tokenizer
from ascendspeed.conversion.output_files import write_json
from ascendspeed.conversion.verify import compare
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.utils.atomic import staged_folder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import of_bytes, progress

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


class Format(Protocol):
    """How to write a checkpoint."""

    def check(self, source: CheckpointReader) -> None:
        """Raises `UserError` when the source cannot be written so."""

    def files(self, source: CheckpointReader, dtype: torch.dtype | None) -> Sequence[PlannedFile]:
        """The files of tensors that will be written."""

    def finish(self, source: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes everything else; called last."""


def convert(
    source: CheckpointReader,
    target: str | Path,
    to: Format,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    allow_nan: bool = False,
) -> None:
    """Writes `source` to the folder `target`, which must not hold anything yet; it appears when it is whole.

    `dtype`: cast to it; None keeps the type of every tensor. `verify`: reads the result back, proves that
    it is the same model (`verify.verify`) and leaves `conversion.json`.
    Raises `UserError`, also when a tensor holds NaN and not `allow_nan`.
    """
    to.check(source)
    hf_assets.check(source)
    files = to.files(source, dtype)
    size = writing.size(source, files, dtype)
    with staged_folder(
        Path(target), size + 64 * 2**20
    ) as folder:  # and something for headers, indices and the tokenizer
        with progress(of_bytes(f"writing {target}"), size) as advance:
            writing.write(source, folder, files, dtype, advance, allow_nan)
        to.finish(source, folder, dtype)
        if verify:
            write_json(folder / "conversion.json", verification.verify(source, open_reader(folder), dtype))


def write_hf(
    source: CheckpointReader,
    target: str | Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "10GB",
    verify: bool = False,
    allow_nan: bool = False,
) -> None:
    """Writes a Hugging Face directory: under the source's own names, or those of another `family`. Raises `UserError`."""
    convert(source, target, HuggingFaceWriter(family, parse_size(max_shard_size)), dtype, verify, allow_nan)


def write_megatron(
    source: CheckpointReader,
    target: str | Path,
    tp: int,
    pp: int = 1,
    deepspeed: bool = False,
    make_vocab_size_divisible_by: int = 128,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    allow_nan: bool = False,
) -> None:
    """Writes rank files for `tp` x `pp` ranks, in Megatron's layout or in that of the DeepSpeed recipe. Raises `UserError`."""
    convert(
        source,
        target,
        RankFileWriter(tp, pp, deepspeed, make_vocab_size_divisible_by),
        dtype,
        verify,
        allow_nan,
    )


def parse_size(text: int | str) -> int:
    """Bytes of '10GB', '500MB', '2GiB' or a number. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    size = (
        float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
        if match
        else 0
    )
    if size < 1:
        raise UserError(f"{text!r} is not a size: write 10GB, 500MB or a number of bytes")
    return int(size)
