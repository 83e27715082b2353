"""Converts a checkpoint to another format; the format of --from is detected.

python tools/ckpt_convert/convert.py --from internlm-7b --output weights --format megatron --tp 8
python tools/ckpt_convert/convert.py --from ckpt --output mine --format hf-llama --dtype bf16 --verify
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ascendspeed.cli import command, parser, train_args
from ascendspeed.config import schema
from ascendspeed.conversion.formats import registry
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.inference.input_checks import check_chat_template
from ascendspeed.models import families
from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.utils import errors, hub
from ascendspeed.utils.atomic import require_empty_dir

TARGETS = registry.writable_formats()
CHOICES = tuple(form.name for form in TARGETS)


@dataclass(frozen=True)
class ConvertCommand:
    """Converts a checkpoint to another format; the format of --from is detected."""

    source: Annotated[str, arg(name="from")]
    """Hugging Face directory, rank files (Megatron-LM or DeepSpeed layout), a training folder of InternEvo,
    or a training checkpoint."""
    target: Annotated[str, parser.output_flag("to")]
    """Folder to write; must be empty or absent."""
    format: Annotated[
        Literal[CHOICES], arg(help="; ".join(f"{form.name}: {form.summary}" for form in TARGETS))
    ]
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Data type of the written tensors; keep: that of each tensor in --from."""
    config: str | None = None
    """Folder with the model's config.json and tokenizer, if --from lacks them; None: --from."""
    tokenizer: str | None = None
    """Folder with the tokenizer to copy; None: that of the source."""
    chat_template: str | None = None
    """Chat template of the weights, to write beside them; None: the one that a training checkpoint or an
    export of this project records, else the source's own file."""
    verify: bool = False
    """Read the result back and compare every tensor bit by bit with the source, and the logits of both."""
    allow_nan: bool = False
    """Convert tensors that contain NaN; otherwise they are an error that names them."""
    writing: WriteOptions = field(default_factory=WriteOptions)
    reading: InternEvoOptions = field(default_factory=InternEvoOptions)


def _check_write_options(options: ConvertCommand, typed: set[str]) -> None:
    """Raises UserError for options that --format does not use, or that are out of range."""
    known = {name for form in TARGETS for name in form.write_options}
    for name in sorted(typed & known - set(registry.format_named(options.format).write_options)):
        if (name, getattr(options.writing, name)) in (("tp", 1), ("pp", 1)):
            continue  # every other format is written for one rank
        formats = " or ".join(form.name for form in TARGETS if name in form.write_options)
        raise errors.UserError(f"{parser.flag_of(name)} is for --format {formats}, not for {options.format}")
    command.check_minimum(options.writing, {"tp": 1, "pp": 1, "make_vocab_size_divisible_by": 1, "wp": 0})
    family = options.writing.to_family
    if family and family not in families.FAMILIES:
        raise errors.UserError(
            f"--to-family {family} does not exist; there are {', '.join(families.FAMILIES)}"
        )
    if options.verify and not registry.format_named(options.format).families("read"):
        raise errors.UserError(
            f"--verify reads the result back, and {options.format} is written only; leave it out"
        )
    if options.verify and options.writing.quantize:
        raise errors.UserError("--verify compares every bit, which --quantize changes; leave it out")
    if options.verify and options.writing.static_rope:
        raise errors.UserError("--verify compares architectures, and --static-rope changes it; leave it out")
    if "scaling_factor" in typed and options.reading.rotary_type != "dynamic":
        raise errors.UserError("--scaling-factor means nothing without --rotary-type dynamic")


def _check_read_options(options: ConvertCommand, typed: set[str]) -> None:
    """Raises UserError for options that the format of --from does not use."""
    source = Path(options.source)
    if not source.is_dir():
        return
    detected = registry.detect_formats(source)
    for form in registry.FORMATS:
        name = min(typed & set(form.read_options), default=None)
        if name and not any(name in other.read_options for other in detected):
            raise errors.UserError(f"{parser.flag_of(name)} is for {form.contents}, which {source} is not")


def _check_names(options: ConvertCommand) -> None:
    """Raises UserError for mistakes that would otherwise be found after the checkpoint has been hashed."""
    if options.tokenizer:
        from ascendspeed.tokenization.tokenizer import find_vocabulary  # here, for it imports numpy

        find_vocabulary(Path(options.tokenizer))
    check_chat_template(options.chat_template)
    try:
        model = train_args.find_model(options.source)
    except errors.UserError:
        return  # the reader of the format says more
    if model:
        schema.check_tensor_parallel(model, options.writing.tp)


def main() -> None:
    """Parses the command line, converts, and prints the target."""
    options = parser.parse(ConvertCommand, description=__doc__ or "")
    typed = parser.typed_fields(ConvertCommand)
    _check_write_options(options, typed)
    require_empty_dir(options.target)
    options, _ = hub.localize(options, {"source": True, "config": False, "tokenizer": False})
    _check_read_options(options, typed)
    _check_names(options)
    from ascendspeed.conversion import (  # after the checks, which need no torch
        chat_assets,
        convert,
        verify,
    )

    writer = registry.format_named(options.format).writer(options.writing)
    reader = convert.open_reader(options.source, options.config, options.reading)
    reader = convert.with_tokenizer(reader, options.tokenizer)
    reader = chat_assets.with_template(reader, options.chat_template)
    print(
        f"from {reader.path}: {reader.description}, {reader.config.family}, {len(reader.names())} parameters"
    )
    dtype = convert.DTYPES.get(options.dtype)
    report = convert.convert(reader, options.target, writer, dtype, options.verify, options.allow_nan)
    print(f"{verify.summary(report)}: {options.target}" if report else options.target)


def run_command() -> None:
    """Runs the command as a program."""
    errors.run(main, clean_up=True)


if __name__ == "__main__":
    run_command()
