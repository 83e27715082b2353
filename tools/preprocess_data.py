"""Text -> `P_<key>_document.{bin,idx}` for training; instruction data -> `P_packed_{input_ids,labels}_document`.

    python tools/preprocess_data.py --input train.parquet --tokenizer-name-or-path DIR --output-prefix P \\
        --workers 4 --log-interval 1000 --handler-name AlpacaPretrainHandler --append-eod
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ascendspeed.cli import parser
from ascendspeed.data.handlers.registry import HANDLERS
from ascendspeed.data.preprocess import MAX_DOCUMENT_BYTES, EncoderConfig, preprocess
from ascendspeed.utils import errors


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
    """How a row becomes a document. All of it is learnt: GeneralPretrainHandler, AlpacaPretrainHandler. The answers are learnt,
    in the published prompt: GeneralInstructionHandler, BelleMultiTurnInstructionHandler; in the model's chat format:
    AlpacaStyleInstructionHandler, SharegptStyleInstructionHandler."""
    chat_template: str | None = None
    """Chat format by name (v1, v1-eoh, v2, v2.5, v3); default: that of the config.json beside the tokenizer, or the tokenizer's."""
    system: str | None = None
    """System message of conversations that have none."""
    loss_on: Literal["all", "last"] | None = None
    """Answers that are learnt: all of a conversation or the last; default: all, of Belle's the last."""
    strict: bool = False
    """The first row that makes no document is an error, and nothing is written."""
    json_keys: tuple[str, ...] = ("text",)
    """Columns that GeneralPretrainHandler reads, each into a data set of its own."""
    append_eod: bool = False
    """End every document with the tokenizer's eos."""
    workers: Annotated[
        int, tyro.conf.arg(help="Processes; default: one per core.", help_behavior_hint="")
    ] = 0
    log_interval: int = 1000
    """Documents between two lines of progress in a log."""
    max_document_mib: int = MAX_DOCUMENT_BYTES >> 20
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
    """Instruction data: longer documents are cut to this many tokens; those whose answers are cut away are skipped and counted."""
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
    options = parser.parse(Options, description=__doc__ or "")
    typed, kind = parser.typed(Options), HANDLERS.get(options.handler_name)
    if kind and "json_keys" in typed and "json_keys" not in kind.takes and options.json_keys != kind.keys:
        raise errors.UserError(
            f"--json-keys means nothing to {options.handler_name}, only to GeneralPretrainHandler; leave it out"
        )
    for name in sorted(typed & IDLE.keys() - ({"seq_length"} if kind and kind.learns_answers else set())):
        print(f"--{name.replace('_', '-')} has no effect: {IDLE[name]}")
    if (
        options.workers < 0
        or options.log_interval < 1
        or options.max_document_mib < 1
        or not options.json_keys
    ):
        raise errors.UserError(
            "--workers, --log-interval, --max-document-mib and --json-keys must be positive and not empty"
        )
    if options.seq_length is not None and options.seq_length < 2:
        raise errors.UserError(
            f"--seq-length {options.seq_length}: there is nothing to learn in a document of one token"
        )
    job = EncoderConfig(
        tokenizer_path=str(options.tokenizer_name_or_path),
        handler_name=options.handler_name,
        json_keys=options.json_keys,
        append_eod=options.append_eod,
        longest=options.max_document_mib << 20,
        seq_length=options.seq_length,
        chat_template=options.chat_template,
        system=options.system,
        loss_on=options.loss_on,
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    preprocess(
        options.input, options.output_prefix, job, workers, options.log_interval, strict=options.strict
    )


if __name__ == "__main__":
    errors.run(main)
