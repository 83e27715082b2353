"""Converts a checkpoint to another format; what lies in --from is recognised.

python tools/ckpt_convert/convert.py --from internlm-7b --to weights --format megatron --tp 8
python tools/ckpt_convert/convert.py --from ckpt --to internlm-7b-mine --format hf-llama --dtype bf16 --verify
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from ascendspeed.cli import parser
from ascendspeed.models import families
from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.utils import errors

if TYPE_CHECKING:
    from ascendspeed.conversion.convert import Format


@dataclass(frozen=True)
class Options:
    """Converts a checkpoint to another format; what lies in --from is recognised."""

    source: Annotated[str, arg(name="from")]
    """Hugging Face directory, rank files (Megatron or DeepSpeed layout), training folder of InternEvo, or a training checkpoint."""
    target: Annotated[str, arg(name="to")]
    """Folder to write; must not hold anything yet."""
    format: Literal["hf", "hf-llama", "megatron", "deepspeed", "internevo"]
    """hf: the family's own names; hf-llama: plain LlamaForCausalLM; megatron, deepspeed: rank files; internevo: training folder."""
    tp: int = 1
    """Tensor-parallel ranks to write rank files for."""
    pp: int = 1
    """Pipeline stages to write rank files for."""
    make_vocab_size_divisible_by: int = 128
    """Rank files pad the vocabulary to a multiple of this x --tp."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Type of the written tensors; keep: as they are."""
    max_shard_size: str = "10GB"
    """Size of a safetensors file."""
    to_family: str | None = None
    """Write under another family's names (--format hf): internlm2 for a plain Llama that was one; None: the source's own."""
    config: str | None = None
    """Folder with the model's config.json, and its tokenizer, where --from has none; None: --from itself."""
    tokenizer: str | None = None
    """Folder with the tokenizer to copy; None: the source's own."""
    copy_code: bool = False
    """Copy the model's *.py too (--format hf), unexecuted, and keep the auto_map that leads to them; else it is dropped."""
    verify: bool = False
    """Read the result back and compare every tensor bit by bit with the source."""
    allow_nan: bool = False
    """Convert tensors that hold NaN too; else they are an error that names them."""
    wp: int = 0
    """Weight-parallel ranks (isp) to write an InternEvo folder for, in place of --tp."""
    internevo_version: Literal[1, 2] = 2
    """InternEvo folder to write: 1, w2 is up and w3 is down (releases before March 2024); 2, w3 is up and w2 is down."""
    embed_split: bool = True
    """InternEvo folder to write: cut the embedding along the hidden size, as embed_split_hidden=True; else along the vocabulary."""
    asked: InternEvoOptions = field(default_factory=InternEvoOptions)


HF, RANKS, EVO = ("hf", "hf-llama"), ("megatron", "deepspeed"), ("internevo",)
MEANT = {
    "tp": (*RANKS, *EVO),
    "pp": ("megatron", *EVO),
    "make_vocab_size_divisible_by": RANKS,
    "max_shard_size": HF,
    "to_family": ("hf",),
    "copy_code": ("hf",),
    "wp": EVO,
    "internevo_version": EVO,
    "embed_split": EVO,
}
"""Options that mean something for these formats only; one rank (--tp 1, --pp 1) is what every other format is written for."""
READING = tuple(option.name for option in fields(InternEvoOptions) if option.name != "family")
"""Options that mean something for a training folder of InternEvo in --from only."""


def _judge(options: Options, typed: set[str]) -> None:
    """Raises `UserError` for what is wrong whatever --from holds."""
    for name in sorted(typed & MEANT.keys()):
        if options.format not in MEANT[name] and (name, getattr(options, name)) not in (("tp", 1), ("pp", 1)):
            raise errors.UserError(
                f"{_flag(name)} is for --format {' or '.join(MEANT[name])}, not for {options.format}"
            )
    for name, least in (("tp", 1), ("pp", 1), ("make_vocab_size_divisible_by", 1), ("wp", 0)):
        if getattr(options, name) < least:
            raise errors.UserError(f"{_flag(name)} {getattr(options, name)} is too small: at least {least}")
    if options.to_family and options.to_family not in families.FAMILIES:
        raise errors.UserError(
            f"--to-family {options.to_family} does not exist; there are {', '.join(families.FAMILIES)}"
        )
    if "scaling_factor" in typed and options.asked.rotary_type != "dynamic":
        raise errors.UserError("--scaling-factor means nothing without --rotary-type dynamic")


def _judge_reading(options: Options, typed: set[str]) -> None:
    """Raises `UserError` for options that say what only an InternEvo folder may not say itself."""
    from ascendspeed.conversion.formats import internevo

    name = min(typed & set(READING), default=None)
    if name and Path(options.source).is_dir() and not internevo.is_one(Path(options.source)):
        raise errors.UserError(
            f"{_flag(name)} is for a training folder of InternEvo, which {options.source} is not"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _format(options: Options) -> "Format":
    """How to write it."""
    from ascendspeed.conversion import convert

    if options.format in HF:
        family = families.REFERENCE.name if options.format == "hf-llama" else options.to_family
        return convert.HuggingFaceWriter(
            family, convert.parse_size(options.max_shard_size), options.copy_code
        )
    if options.format in EVO:
        return convert.InternEvoWriter(
            options.tp,
            options.pp,
            options.wp,
            version=options.internevo_version,
            embed_split=options.embed_split,
        )
    return convert.RankFileWriter(
        options.tp, options.pp, options.format == "deepspeed", options.make_vocab_size_divisible_by
    )


def main() -> None:
    """Parses, converts, says where the result is."""
    options = parser.parse(Options, description=Options.__doc__)
    typed = parser.typed_fields(Options)
    _judge(options, typed)
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.target)
    to = _format(options)
    _judge_reading(options, typed)
    source = convert.with_tokenizer(
        convert.open_reader(options.source, options.config, options.asked), options.tokenizer
    )
    print(f"from {source.where}: {source.kind}, {source.config.family}, {len(source.names())} parameters")
    convert.convert(
        source, options.target, to, convert.DTYPES.get(options.dtype), options.verify, options.allow_nan
    )
    print(f"{'verified, every bit: ' if options.verify else ''}{options.target}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
