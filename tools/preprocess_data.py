"""Text -> `P_<key>_document.{bin,idx}` for training.

    python tools/preprocess_data.py --input train.parquet --tokenizer-name-or-path DIR --output-prefix P \\
        --workers 4 --log-interval 1000 --handler-name AlpacaPretrainHandler --append-eod
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ascendspeed import errors, flags
from ascendspeed.data.preprocess import LONGEST, Job, preprocess


@dataclass(frozen=True)
class Options:
    """Flags of the published tool."""

    input: tuple[str, ...]
    """Parquet, json, jsonl, csv or txt files (json, jsonl, csv and txt also as .gz), globs or folders."""
    tokenizer_name_or_path: Path
    """Hugging Face directory with tokenizer.model or tokenizer.json."""
    output_prefix: str
    """Writes <prefix>_<key>_document.bin and .idx."""
    handler_name: str = "GeneralPretrainHandler"
    """How a row becomes text: GeneralPretrainHandler, AlpacaPretrainHandler."""
    json_keys: tuple[str, ...] = ("text",)
    """Columns that GeneralPretrainHandler reads, each into a data set of its own."""
    append_eod: bool = False
    """End every document with the tokenizer's eos."""
    workers: Annotated[int, tyro.conf.arg(help="Processes; default: one per core.", help_behavior_hint="")] = 0
    log_interval: int = 1000
    """Documents between two lines of progress in a log."""
    max_document_mib: int = LONGEST >> 20
    """Longer documents are skipped and counted as huge."""
    tokenizer_type: Literal["PretrainedFromHF"] = "PretrainedFromHF"
    """The tokenizer is that of a Hugging Face directory."""
    dataset_impl: Literal["mmap"] = "mmap"
    """The format of the output."""
    tokenizer_not_use_fast: bool = False
    """Accepted for the published recipe."""
    streaming: bool = False
    """Accepted for the published recipe."""
    seq_length: int | None = None
    """Accepted for the published recipe."""
    make_vocab_size_divisible_by: int = 128
    """Accepted for the published recipe."""
    pad_vocab_size_to: int | None = None
    """Accepted for the published recipe."""


IDLE = {
    "tokenizer_not_use_fast": "tokenizer.model is used wherever there is one, and its ids are the slow tokenizer's",
    "streaming": "rows are always streamed",
    "seq_length": "documents are stored whole and cut into samples when they are trained on",
    "make_vocab_size_divisible_by": "the ids in the files do not depend on the padding of the model's vocabulary",
    "pad_vocab_size_to": "the ids in the files do not depend on the padding of the model's vocabulary",
}
"""Flags that do nothing, and why."""


def main() -> None:
    """The command line."""
    options = flags.parse(Options, description=__doc__ or "")
    for name in sorted(flags.typed(Options) & IDLE.keys()):
        print(f"--{name.replace('_', '-')} has no effect: {IDLE[name]}")
    if options.workers < 0 or options.log_interval < 1 or options.max_document_mib < 1 or not options.json_keys:
        raise errors.UserError("--workers, --log-interval, --max-document-mib and --json-keys must be positive and not empty")
    job = Job(
        tokenizer_path=str(options.tokenizer_name_or_path),
        handler_name=options.handler_name,
        json_keys=options.json_keys,
        append_eod=options.append_eod,
        longest=options.max_document_mib << 20,
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    preprocess(options.input, options.output_prefix, job, workers, options.log_interval)


if __name__ == "__main__":
    errors.run(main)
