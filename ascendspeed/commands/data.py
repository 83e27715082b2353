"""Tokenizes text to `P_<key>_document.{bin,idx}`, instruction data to `P_packed_{input_ids,labels}_document`.

    python tools/preprocess_data.py --input train.parquet --tokenizer-name-or-path DIR --output P \\
        --workers 4 --log-interval 1000 --handler-name AlpacaPretrainHandler --append-eod
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import PREPROCESS
from ascendspeed.data.handlers.registry import HANDLERS
from ascendspeed.data.preprocess import MAX_DOCUMENT_BYTES, EncoderConfig, preprocess
from ascendspeed.models.families import chat_template_beside
from ascendspeed.utils import errors, hub

MAX_WORKERS = 1024
"""More processes than that are a mistake."""


@dataclass(frozen=True)
class DataCommand:
    """Input, tokenization and output."""

    input: tuple[str, ...]
    """Parquet, jsonl, ndjson, json, csv, tsv or txt files, all but parquet also as .gz, .zst, .xz or .bz2;
    quoted globs or folders."""
    tokenizer_name_or_path: Path
    """Hugging Face directory with tokenizer.model or tokenizer.json."""
    output_prefix: Annotated[str, parser.output_flag("output-prefix")]
    """Prefix of the files <prefix>_<key>_document.bin and .idx."""
    handler_name: str = "GeneralPretrainHandler"
    """Handler that converts a row to a document. The whole text is in the loss: GeneralPretrainHandler,
    AlpacaPretrainHandler. The answers are in the loss, with the published prompt: GeneralInstructionHandler,
    BelleMultiTurnInstructionHandler; with the model's chat template: AlpacaStyleInstructionHandler,
    SharegptStyleInstructionHandler. Preference pairs, both answers in the loss: AlpacaStylePairwiseHandler,
    SharegptStylePairwiseHandler, HuggingFacePairwiseHandler."""
    chat_template: str | None = None
    """Chat template: v1, v1-eoh, v2, v2.5 or v3; default: that of the config.json beside the tokenizer, or of
    the tokenizer."""
    system: str | None = None
    """System message of conversations that have none."""
    loss_on: Literal["all", "last"] | None = None
    """Answers of a conversation in the loss: all, or the last; default: all, the last for Belle."""
    overwrite: bool = False
    """Replace data of the prefix that are made from other files or with other settings."""
    parse_special_tokens: bool = False
    """Special tokens in the text (<s>, <|im_end|>, a <think> that the tokenizer declares as special) become
    their ids; otherwise they stay text. With a chat template all but BOS, EOS and those of the
    template."""
    strict: bool = False
    """Stop at the first row that cannot be converted, and write nothing."""
    json_keys: tuple[str, ...] = ("text",)
    """Columns for GeneralPretrainHandler; each is written to a dataset of its own."""
    append_eod: bool = False
    """Append the tokenizer's EOS to every document."""
    workers: Annotated[
        int, tyro.conf.arg(help="Worker processes; default: one per core.", help_behavior_hint="")
    ] = 0
    log_interval: int = 1000
    """Documents between two progress lines."""
    max_document_mib: int = MAX_DOCUMENT_BYTES >> 20
    """Largest document in MiB; longer ones are skipped and counted as huge."""
    seq_length: int | None = None
    """Instruction data: truncate documents to this many tokens; documents whose answers are truncated away
    entirely are skipped and counted. Preference pairs: skip and count those of more tokens, with both
    conversations."""


def _check(options: DataCommand) -> None:
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
    if options.workers > MAX_WORKERS:
        raise errors.UserError(f"--workers {options.workers}: at most {MAX_WORKERS}, one per core is enough")
    if options.seq_length is not None and options.seq_length < 2:
        raise errors.UserError(
            f"--seq-length {options.seq_length}: a document of one token has no token to predict"
        )


def main() -> None:
    """Runs the command."""
    line = command.parse(DataCommand, table=PREPROCESS, description=__doc__ or "")
    options = line.options
    handler = HANDLERS.get(options.handler_name)
    ignores_keys = (
        handler and "json_keys" not in handler.accepted_settings and options.json_keys != handler.keys
    )
    if ignores_keys and "json_keys" in line.typed:
        raise errors.UserError(
            f"--json-keys means nothing to {options.handler_name}, only to GeneralPretrainHandler; "
            "leave it out"
        )
    for note in line.notes:
        print(note)
    if "seq_length" in line.typed and not (handler and handler.has_loss_mask):
        print("--seq-length is ignored: pre-training documents are stored whole, and cut in training")
    _check(options)
    options, _ = hub.localize(options, {"tokenizer_name_or_path": False})
    template = options.chat_template
    if template is None and handler and "chat_template" in handler.accepted_settings:
        template = chat_template_beside(options.tokenizer_name_or_path)
    encoder = EncoderConfig(
        tokenizer_path=str(options.tokenizer_name_or_path),
        handler_name=options.handler_name,
        json_keys=options.json_keys,
        append_eod=options.append_eod,
        longest=options.max_document_mib << 20,
        seq_length=options.seq_length,
        chat_template=template,
        system=options.system,
        loss_on=options.loss_on,
        parse_special_tokens=options.parse_special_tokens,
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    preprocess(
        options.input,
        options.output_prefix,
        encoder,
        workers,
        options.log_interval,
        strict=options.strict,
        overwrite=options.overwrite,
    )


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main, clean_up=True)


if __name__ == "__main__":
    run_command()
