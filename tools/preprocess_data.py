"""Text -> `P_<key>_document.{bin,idx}` for training; instruction data -> `P_packed_{input_ids,labels}_document`.

    python tools/preprocess_data.py --input train.parquet --tokenizer-name-or-path DIR --output-prefix P \\
        --workers 4 --log-interval 1000 --handler-name AlpacaPretrainHandler --append-eod
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ascendspeed.cli import command
from ascendspeed.cli.compat import PREPROCESS
from ascendspeed.data.handlers.registry import HANDLERS
from ascendspeed.data.preprocess import MAX_DOCUMENT_BYTES, EncoderConfig, preprocess
from ascendspeed.models.families import chat_template_beside
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
    seq_length: int | None = None
    """Instruction data: longer documents are cut to this many tokens; those whose answers are cut away are skipped and counted."""


def _check(options: Options) -> None:
    """Raises UserError for numbers that are too small."""
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
            f"--seq-length {options.seq_length}: a document of one token has no token to predict"
        )


def main() -> None:
    """Runs the command."""
    line = command.parse(Options, table=PREPROCESS, description=__doc__ or "")
    options = line.options
    handler = HANDLERS.get(options.handler_name)
    ignores_keys = (
        handler and "json_keys" not in handler.accepted_settings and options.json_keys != handler.keys
    )
    if ignores_keys and "json_keys" in line.typed:
        raise errors.UserError(
            f"--json-keys means nothing to {options.handler_name}, only to GeneralPretrainHandler; leave it out"
        )
    for note in line.notes:
        print(note)
    if "seq_length" in line.typed and not (handler and handler.has_loss_mask):
        print(
            "--seq-length is ignored: pre-training documents are stored whole, and cut into samples in training"
        )
    _check(options)
    template = options.chat_template
    if template is None and handler and "chat_template" in handler.accepted_settings:
        template = chat_template_beside(options.tokenizer_name_or_path)
    job = EncoderConfig(
        tokenizer_path=str(options.tokenizer_name_or_path),
        handler_name=options.handler_name,
        json_keys=options.json_keys,
        append_eod=options.append_eod,
        longest=options.max_document_mib << 20,
        seq_length=options.seq_length,
        chat_template=template,
        system=options.system,
        loss_on=options.loss_on,
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    preprocess(
        options.input, options.output_prefix, job, workers, options.log_interval, strict=options.strict
    )


if __name__ == "__main__":
    errors.run(main)
